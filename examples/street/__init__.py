"""A small renderer of street-like scenes with exact labels; see `render_scenes.py` beside this folder."""
