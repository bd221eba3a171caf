"""The tiny Llama that comes with the package, and the script that made it."""
