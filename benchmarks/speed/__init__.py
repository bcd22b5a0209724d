"""How fast training, sampling and loading are beside what people use today, on this machine."""
