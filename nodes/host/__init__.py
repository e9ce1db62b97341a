"""The only code that knows ComfyUI's insides; every function names the versions it was run on."""
