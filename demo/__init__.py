"""The bundled small VLM: the generator of its pictures and questions, and how it is trained.

`scenes.scene(seed, split)` makes one picture with its five questions, `sets.write_set` a folder of them, and
`model/` holds the trained checkpoint. Nothing here imports the rest of vlmc.
"""
