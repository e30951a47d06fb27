"""What a recipe will need: memory, time, money, checkpoints. Arithmetic alone: no weights, no Ray, no GPU."""
