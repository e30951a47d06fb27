'''Rewards: one part of the reward each, scored in a child process that can be killed (rlkd/engines/jail.py).

Your own reward is a function in a file of yours:

    def short(prompt, answer, words: int = 50) -> float:
        """1 if the answer has at most `words` words."""
        return float(len(answer.split()) <= words)

Name it in the recipe as `my_rewards.py:short` (or `my_package.my_module:short`); its further parameters are its
options, beside `weight`. A reward that needs the whole group or the number of tokens is a frozen dataclass with
`weight` and `score(prompt, answers)`, as every file of this folder is. None means "I cannot judge this one"; whatever
raises, hangs, crashes or returns NaN is reported with its answer, and never becomes a 0 by itself.

    math  exact  regex  choice  format  length  overlong  repetition  reasoning_gym  arithmetic  code

table.py      the names, and how rewards travel to the jail
own.py        a user's own reward, from an import path or a file
mix.py        the weighted sum
extract.py    the final answer inside a text · guard.py  what must not be evaluated · options.py  checks of options
'''
