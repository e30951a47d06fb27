"""rlkd: reinforcement learning with verifiable rewards, and distillation, for language models. See README.md."""
