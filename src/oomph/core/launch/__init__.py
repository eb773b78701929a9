"""Recipes from the launch scripts of LLaVA and its relatives. A script is read, never run."""
