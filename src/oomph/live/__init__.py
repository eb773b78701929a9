"""What runs a model's own code: the only folder that imports torch and transformers."""
