"""The control plane: thin routes over launches, GPUs and traffic. Parse, authorise, call one thing, answer."""
