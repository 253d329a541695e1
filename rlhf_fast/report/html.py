"""The page of a report: one HTML file with style and pictures inside, no script, no network.

All text that comes from outside (models, data, configuration, environment) passes `escape`. The
page also forbids itself, by a Content-Security-Policy, to run or load anything: a sample that got
past the escaping would still be inert.
"""

from __future__ import annotations

import html
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from rlhf_fast.errors import EnvironmentFault

# CSI and OSC sequences, then any other escape; what is left of C0 and C1 controls goes after.
_ANSI = re.compile(
    r"\x1b\[[0-?]*[ -/]*[@-~]|\x9b[0-?]*[ -/]*[@-~]|\x1b\][^\x07\x1b]*(?:\x07|\x1b\\)?|\x1b[@-_]?"
)
_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
# Bidirectional overrides reorder the text around them, also outside their own cell.
_OVERRIDES = re.compile("[\u202a-\u202e\u2066-\u2069]")

STYLE = """
:root{color-scheme:light dark;--bg:#f6f7f9;--card:#fff;--ink:#1c2330;--quiet:#667085;
--rule:#e3e7ee;--good:#157f4b;--bad:#b42318;--c1:#2f6fde;--c2:#d9480f;--c3:#15846b;
--c4:#8b46c9;--c5:#b07c00;--c6:#64748b}
@media(prefers-color-scheme:dark){:root{--bg:#0f131a;--card:#181e28;--ink:#e6eaf2;
--quiet:#98a2b3;--rule:#2b3443;--good:#47c98b;--bad:#ff8072;--c1:#6ea4ff;--c2:#ff8f57;
--c3:#3fc3a3;--c4:#c39bf5;--c5:#e3b341;--c6:#9aa8bd}}
*{box-sizing:border-box}
body{margin:0;background:var(--bg);color:var(--ink);
font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,Helvetica,Arial,sans-serif}
main{max-width:1180px;margin:0 auto;padding:32px 20px 64px}
h1{font-size:1.9rem;line-height:1.2;margin:0 0 6px;letter-spacing:-.01em}
h2{font-size:1.25rem;margin:44px 0 12px}
p{margin:0 0 12px;max-width:80ch}
.quiet,figcaption+.quiet{color:var(--quiet)}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(170px,1fr));gap:14px;margin:24px 0}
.tile,figure,.card{background:var(--card);border:1px solid var(--rule);border-radius:12px}
.tile{padding:14px 16px}
.tile b{display:block;font-size:1.75rem;line-height:1.25;font-variant-numeric:tabular-nums}
.tile span{color:var(--quiet);font-size:.86rem}
.tile.good b{color:var(--good)}.tile.bad b{color:var(--bad)}
.verdict{font-weight:600}.verdict.good{color:var(--good)}.verdict.bad{color:var(--bad)}
ul.findings{padding-left:20px;max-width:84ch}ul.findings li{margin:0 0 8px}
.charts{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,430px),1fr));gap:16px}
.charts.small{grid-template-columns:repeat(auto-fit,minmax(min(100%,320px),1fr))}
figure{margin:0;padding:14px 16px 8px;min-width:0}
figcaption{font-weight:600;font-size:.95rem;margin-bottom:4px;overflow-wrap:anywhere}
svg{display:block;width:100%;max-width:660px;height:auto}
.legend{display:flex;flex-wrap:wrap;gap:2px 16px;font-size:.82rem;color:var(--quiet)}
.key::before{content:"";display:inline-block;width:20px;margin-right:6px;vertical-align:middle;
border-top:3px solid currentColor}
.key.dashed::before{border-top-style:dashed}
.key.c1::before{color:var(--c1)}.key.c2::before{color:var(--c2)}.key.c3::before{color:var(--c3)}
.key.c4::before{color:var(--c4)}.key.c5::before{color:var(--c5)}.key.c6::before{color:var(--c6)}
.c1{--c:var(--c1)}.c2{--c:var(--c2)}.c3{--c:var(--c3)}.c4{--c:var(--c4)}.c5{--c:var(--c5)}
.c6{--c:var(--c6)}
svg text{fill:var(--quiet);font-size:12px}svg .label{fill:var(--ink);font-size:12.5px}
svg .grid{stroke:var(--rule)}svg .axis{stroke:var(--quiet)}
svg .line{stroke:var(--c);fill:none;stroke-width:2.2;stroke-linejoin:round}
svg .line.thin{stroke-width:1.2}
svg .dot{fill:var(--c);stroke:var(--card);stroke-width:1.2}
svg .dot.hollow{fill:var(--card);stroke:var(--c);stroke-width:1.6}svg .fill{fill:var(--c)}
.scroll{overflow-x:auto}
.card{margin:0 0 16px}
table{border-collapse:collapse;width:100%;font-size:.9rem}
th,td{text-align:left;vertical-align:top;padding:8px 12px;border-top:1px solid var(--rule)}
thead th{border-top:0;color:var(--quiet);font-weight:600;white-space:nowrap}
td{overflow-wrap:anywhere}td.number,th.number{text-align:right;white-space:nowrap;
font-variant-numeric:tabular-nums}
td.code,td.text{font-family:ui-monospace,SFMono-Regular,Menlo,Consolas,monospace;font-size:.84rem}
td.text{white-space:pre-wrap;min-width:210px}
details{margin:0 0 14px}summary{cursor:pointer;font-weight:600;padding:6px 0}
footer{margin-top:48px;color:var(--quiet);font-size:.85rem}
@media print{body{background:#fff}.tile,figure,.card{break-inside:avoid}}
"""


def clean(text: object) -> str:
    """Text without terminal escapes, control characters and bidirectional overrides."""
    return _OVERRIDES.sub("", _CONTROLS.sub("", _ANSI.sub("", str(text).replace("\r\n", "\n"))))


def escape(text: object) -> str:
    """`clean` text with `& < > " '` as entities, safe in element content and attributes."""
    return html.escape(clean(text).encode("utf-8", "replace").decode("utf-8"), quote=True)


def section(title: str, *parts: str) -> str:
    """A heading and its parts; nothing at all if every part is empty."""
    body = "".join(parts)
    return f"<section><h2>{escape(title)}</h2>{body}</section>" if body else ""


def paragraph(text: str, kind: str = "") -> str:
    """A paragraph of escaped text, with a CSS class if given."""
    return f'<p class="{kind}">{escape(text)}</p>' if kind else f"<p>{escape(text)}</p>"


def bullets(lines: Iterable[str]) -> str:
    """A list of escaped sentences."""
    return f'<ul class="findings">{"".join(f"<li>{escape(line)}</li>" for line in lines)}</ul>'


def tiles(entries: Iterable[tuple[str, str, str]]) -> str:
    """Headline figures: (value, caption, CSS class: empty, `good` or `bad`)."""
    cells = "".join(
        f'<div class="tile {kind}"><b>{escape(value)}</b><span>{escape(caption)}</span></div>'
        for value, caption, kind in entries
    )
    return f'<div class="tiles">{cells}</div>'


def charts(figures: Sequence[str], small: bool = False) -> str:
    """Figures side by side where there is room; nothing if there are none."""
    if not figures:
        return ""
    return f'<div class="charts{" small" if small else ""}">{"".join(figures)}</div>'


def table(
    header: Sequence[str], rows: Iterable[Sequence[object]], kinds: Sequence[str] = ()
) -> str:
    """A table of escaped cells; nothing if there are no rows.

    Args:
        header: column titles.
        rows: cells, as many as titles.
        kinds: CSS class of each column: empty, `number`, `code` or `text`.
    """
    kinds = kinds or [""] * len(header)
    body = "".join(
        "<tr>"
        + "".join(
            f'<td class="{kind}">{escape(cell)}</td>' for cell, kind in zip(row, kinds, strict=True)
        )
        + "</tr>"
        for row in rows
    )
    if not body:
        return ""
    titles = "".join(
        f'<th class="{kind}">{escape(title)}</th>'
        for title, kind in zip(header, kinds, strict=True)
    )
    return (
        f'<div class="card scroll"><table><thead><tr>{titles}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def details(summary: str, body: str) -> str:
    """A part that is folded at first; nothing if the body is empty."""
    if not body:
        return ""
    return f"<details><summary>{escape(summary)}</summary>{body}</details>"


def page(title: str, subtitle: str, *parts: str) -> str:
    """The whole document."""
    policy = "default-src 'none'; style-src 'unsafe-inline'"
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head><body><main>"
        f'<h1>{escape(title)}</h1><p class="quiet">{escape(subtitle)}</p>'
        + "\n".join(part for part in parts if part)
        + "<footer>Written by rlhf-fast. This page is complete in itself: it loads nothing and runs"
        " no script.</footer></main></body></html>\n"
    )


def write_page(out: Path, text: str) -> Path:
    """Write the document atomically and return its path.

    Raises:
        EnvironmentFault: RF7901, the place cannot be written.
    """
    partial = out.with_name(out.name + ".partial")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, out)
    except OSError as error:
        raise EnvironmentFault(
            "RF7901",
            f"cannot write the report: {error.strerror or error}",
            where=str(out),
            remedy="free the space, or name another place with --out",
        ) from error
    return out
