"""Makes `atlas/` (and the extra training photographs) from Debian's packages; README.md says which.

python -m vlmc.demo.make_atlas FOLDER_WITH_UNPACKED_PACKAGES FASHION_FOLDER
"""

import sys
from pathlib import Path

from PIL import Image

from .atlas import CELL, EACH, FOLDER, fashion
from .words import GARMENTS

HEIGHT = 200  # of a kept photograph: enough for crops that are shown at 128
KEPT = {
    "hills": "sunset_by_Aitzol_Berasategi.jpg",
    "brook": "life_by_Aitzol_Berasategi.jpg",
    "alps": "picosdeeuropa_by_Aitzol_Berasategi.jpg",
    "meadow": "aitzgorri_by_Aitzol_Berasategi.jpg",
}
TRAINING_ONLY = {
    "boats": "EveningGlow/contents/images/2560x1600.jpg",
    "lake": "DarkestHour/contents/images/2560x1600.jpg",
    "pines": "Path/contents/images/2560x1600.jpg",
    "dune": "nature/Dune.jpg",
    "beach": "Bridge_by_Sander_Klootwijk.jpg",
}


def _photograph(packages: Path, name: str) -> Image.Image:
    found = [path for path in packages.rglob(Path(name).name) if str(path).endswith(name)]
    if len(found) != 1:
        raise SystemExit(f"{name}: found {len(found)} files under {packages}, wanted one; unpack the packages there")
    picture = Image.open(found[0]).convert("RGB")
    return picture.resize((round(picture.width * HEIGHT / picture.height), HEIGHT), Image.Resampling.LANCZOS)


def main(packages: Path, garments: Path) -> None:
    FOLDER.mkdir(exist_ok=True)
    train, held_out = fashion(garments, "train"), fashion(garments, "t10k")
    seen = EACH["train"] + EACH["calibration"]
    sheet = Image.new("L", (CELL * sum(EACH.values()), CELL * len(GARMENTS)))
    for row, kind in enumerate(GARMENTS):
        for column, cell in enumerate([*train[kind][:seen], *held_out[kind][: EACH["test"]]]):
            sheet.paste(Image.frombytes("L", (CELL, CELL), cell), (column * CELL, row * CELL))
    sheet.save(FOLDER / "garments.png", optimize=True)
    for name, source in KEPT.items():
        _photograph(packages, source).save(FOLDER / f"{name}.jpg", quality=88)
    for name, source in TRAINING_ONLY.items():
        picture = _photograph(packages, source)
        if name == "pines":  # a dark picture of a wood by day
            picture = picture.point(lambda v: min(255, round(v * 1.7)))
        picture.save(garments / f"{name}.jpg", quality=92)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
