"""What a model knows besides the history: who asks (profiles) and in which situation (contexts). Does not import torch."""
