"""BERT, GPT-2 and ViT as flax modules, and their published weights in Hugging Face's files."""
