"""rlkd: reinforcement learning with verifiable rewards, and distillation, for language models, on Ray. See README.md."""
