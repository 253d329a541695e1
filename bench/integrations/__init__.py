"""Other trainers' functions, their own against ours."""
