#!/usr/bin/env bash
# What `make demo` shows, on any CPU: a small model folder, video from a text and from an image, backends, coverage, and a
# run of the conformance suite.
set -euo pipefail
cd "$(dirname "$0")/.."

OUT=out/demo
MODEL=$OUT/tiny-distilled
SIZE=(--height 128 --width 192)

echo "Demo: about a minute on two cores. The weights are random, so the videos are noise and say so."
mkdir -p "$OUT"

echo; echo "1. A model folder in the published layout, with random weights"
python tools/make_checkpoint.py --size tiny --variant distilled --out "$MODEL" --force

echo; echo "2. Video from a text"
helios generate "a lighthouse in a storm, waves and dark clouds" --model "$MODEL" "${SIZE[@]}" \
    --chunks 2 --seed 1 --out "$OUT/text.mp4" --overwrite --sheet

echo; echo "3. Video from an image"
python - "$OUT/start.png" <<'PICTURE'
"""A lighthouse, drawn."""
import sys

from PIL import Image, ImageDraw

picture = Image.linear_gradient("L").resize((384, 256))
picture = Image.merge("RGB", (picture.point(lambda v: 40 + v // 3), picture.point(lambda v: 60 + v // 2), picture.point(lambda v: 110 + v // 2)))
draw = ImageDraw.Draw(picture)
draw.rectangle((0, 190, 384, 256), fill=(20, 50, 90))
draw.polygon([(170, 200), (182, 80), (202, 80), (214, 200)], fill=(230, 225, 215))
draw.rectangle((178, 120, 206, 145), fill=(180, 40, 40))
draw.rectangle((180, 62, 204, 80), fill=(255, 230, 120))
picture.save(sys.argv[1])
PICTURE
helios generate "the lamp of the lighthouse turns" --model "$MODEL" --image "$OUT/start.png" "${SIZE[@]}" \
    --chunks 2 --seed 1 --out "$OUT/image.mp4" --overwrite --sheet

echo; echo "4. The backends of this machine"
helios backends

echo; echo "5. What the cpu backend runs of the graph of one step"
helios graph --size tiny --pyramid-stage 2 "${SIZE[@]}" --backend cpu --flops

echo; echo "6. Does the cpu backend compute Helios right? The quick suite, about half a minute"
rm -rf "$OUT/certify"
helios certify --backend cpu --out "$OUT/certify"

echo
echo "Also in $OUT: image.mp4, and a contact sheet beside each video (text.png, image.png)."
echo "Open $OUT/text.mp4 and $OUT/certify/report.html"
