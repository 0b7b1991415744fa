"""What each GLM family is: prompts, answers, ends, names."""
