"""Models without a hub: the tiny arithmetic student and two small real models from package registries.

arithmetic.py  the tiny student's task: problems, worked answers, score
tiny.py        the tiny student: architecture, character tokenizer, warm start
get.py         `get(name, directory)`: a Hugging Face folder from a name
"""
