"""The defence benchmark: attacks of the literature re-created on small networks, so that repairs can be measured."""
