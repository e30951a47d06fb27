"""Files for the platforms that run a recipe: pods, batch scripts, images. Texts alone: nothing is started from here."""

PLATFORMS = ("kuberay", "slurm", "docker", "ray-up")
