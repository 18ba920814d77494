"""The README's first picture: the loads of 96 experts in a recorded run, and the balance loss that calls them balanced.

SVG by hand, in two inks: GitHub has a white page and a dark one, and a picture cannot ask on which it stands.
"""

from __future__ import annotations

from typing import NamedTuple


class Inks(NamedTuple):
    text: str
    muted: str  # lines and small words; at least 4.5:1 on its page
    experts: str
    chosen: str


LIGHT = Inks(text="#1f2328", muted="#59636e", experts="#d55e00", chosen="#1f78b8")
DARK = Inks(text="#f0f6fc", muted="#9198a1", experts="#e8853d", chosen="#58a6ff")
WIDTH, BASE, UNIT = 760, 218, 66  # pixels: the picture, the bars' foot from its top, and one fair share
LEFT, STEP, BAR = 20, 7.5, 5.5  # pixels: the first bar, from bar to bar, and a bar
TOKEN_GOES_TO = 30  # place of the expert that the drawing's token is sent to; any would do


def loads(run: dict) -> list[float]:
    """Layer 0's loads on held-out text in fair shares, the busiest first."""
    return sorted((len(run["heldout"]["f"][0]) * f for f in run["heldout"]["f"][0]), reverse=True)


def hero(run: dict, inks: Inks) -> str:
    """Token, router, 96 bars; the loss in large figures beside them."""
    shares, lbl = loads(run), run["heldout"]["lbl"][0]
    xs = [LEFT + STEP * place for place in range(len(shares))]
    bars = "".join(
        f'<rect x="{x:.1f}" y="{BASE - UNIT * share:.1f}" width="{BAR}" height="{UNIT * share:.1f}"'
        f' fill="{inks.chosen if place == TOKEN_GOES_TO else inks.experts}"/>'
        for place, (x, share) in enumerate(zip(xs, shares, strict=True))
    )
    fan = "".join(f"M380 284L{x + BAR / 2:.1f} {BASE + 4}" for x in xs)
    chosen, fair, end = xs[TOKEN_GOES_TO] + BAR / 2, BASE - UNIT, xs[-1] + BAR
    return f"""\
<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} 326" width="{WIDTH}" height="326" role="img" \
font-family="system-ui, sans-serif" font-size="20" fill="{inks.text}">
<title>{says(run)}</title>
{bars}
<path d="M{LEFT} {fair}H{end:.1f}" stroke="{inks.text}" stroke-width="1.5" stroke-dasharray="5 4"/>
<path d="{fan}" stroke="{inks.muted}" stroke-width=".6" stroke-opacity=".5"/>
<path d="M380 284L{chosen:.1f} {BASE + 4}M262 302H326" stroke="{inks.chosen}" stroke-width="3"/>
<path d="M338 302l-13 -7v14z" fill="{inks.chosen}"/>
<g fill="none" stroke="{inks.muted}" stroke-width="1.5"><rect x="132" y="284" width="128" height="36" rx="7"/>\
<rect x="338" y="284" width="84" height="36" rx="7"/></g>
<g text-anchor="middle"><text x="196" y="309">one token</text><text x="380" y="309">router</text></g>
<text x="440" y="309" fill="{inks.muted}">one of {len(shares)} experts works</text>
<text x="{LEFT + 14}" y="{BASE - UNIT * shares[0] + 12:.0f}">busiest: {shares[0]:.1f} times a fair share</text>
<text x="{end:.0f}" y="{fair - 8}" text-anchor="end" fill="{inks.muted}">a fair share</text>
<g text-anchor="end"><text x="{end:.0f}" y="46" font-size="50" font-weight="600">{lbl:.2f}</text>\
<text x="{end:.0f}" y="76">the layer\u2019s balance loss</text>\
<text x="{end:.0f}" y="101" fill="{inks.muted}">where 1.00 means \u201cbalanced\u201d</text></g>
</svg>
"""


def says(run: dict) -> str:
    """The picture in words."""
    shares = loads(run)
    return (
        f"One token goes through a router to one of {len(shares)} experts. The busiest expert gets {shares[0]:.1f} times a"
        f" fair share of the tokens, the idlest {shares[-1]:.1f} times, and the balance loss is"
        f" {run['heldout']['lbl'][0]:.2f}, where 1.00 means balanced."
    )
