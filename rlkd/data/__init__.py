"""Prompts: where they come from, what makes one, and how it becomes tokens.

chat.py        `HFTokenizer`: a model folder's tokenizer and chat template
loading.py     `load_data`: the recipe's data section → training and held-out prompts
dataset.py     `load`: one source → prompts, fingerprint, funnel, warnings
sources.py     settings → rows      files.py  jsonl, parquet, Hugging Face      generators.py  reasoning-gym, arithmetic
demonstrations.py  worked answers by somebody else: text → the policy's tokens
rows.py        one row → one question, or why not
funnel.py      what became of the rows, and the errors that say so
"""

from rlkd.data.chat import HFTokenizer
from rlkd.data.dataset import Dataset, Rules, load
from rlkd.data.funnel import Funnel
from rlkd.data.loading import Data, load_data

__all__ = ["Data", "Dataset", "Funnel", "HFTokenizer", "Rules", "load", "load_data"]
