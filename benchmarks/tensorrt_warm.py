"""Lets torch.compile do its compiling ahead of a profile: opens each artefact's compiled baseline and runs it once."""

from __future__ import annotations

import sys
from pathlib import Path

from vlmc.artifact import Artifact
from vlmc.calibration.cuda_baseline import open_session
from vlmc.exporter import golden

for folder in sys.argv[1:]:
    artifact = Artifact(Path(folder))
    session = open_session(artifact, "fp32", "compile")
    arrays = golden.read(artifact)[1]
    session.vision.run({"pixel_values": arrays["0.pixel_values"]})
    session.decoder.prefill(arrays["0.inputs_embeds"])
    print(folder, session.decoder.decode(4))
