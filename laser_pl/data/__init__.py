"""From a source of problems to prompts of token ids."""
