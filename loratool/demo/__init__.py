"""`loratool demo`: a real adapter trained, merged, extracted, resized and converted, and every promise measured.

`story` is the way in; `stage` is what the scenes share; `text` and `image` are the scenes.
"""
