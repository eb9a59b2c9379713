"""The style sheet of the pages: fixed classes, filled only from `canvas`, never from data."""

from chipviz.ui.plots.theme import CLASS_COLOURS, SERIES, Look, tint

STRENGTHS = 5
"""Steps of confidence that a tint shows."""

ICON = """<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 32 32">
<rect x="4" y="22" width="24" height="6" rx="2" fill="#0f766e"/>
<rect x="4" y="13" width="24" height="6" rx="2" fill="#0f766e"/>
<rect x="4" y="4" width="24" height="6" rx="2" fill="#0f766e" opacity=".25"/></svg>"""
"""The browser tab's picture, drawn here: a named icon would be fetched from a foreign host."""

_SHEET = """
.stMainBlockContainer { padding-top:4.2rem; padding-bottom:3rem; }
[data-testid="stBaseButton-primary"], [data-testid="stBaseLinkButton-primary"] { color:ON_FILL; }
[data-testid="stCaptionContainer"] { opacity:1; }
[data-testid="stCaptionContainer"] p { color:MUTED; }
.stCode .token { color:inherit !important; }
.stCode .token.keyword { color:ACCENT !important; font-weight:600; }
.stCode .token.string { opacity:.8; }
.stMultiSelect [data-baseweb="tag"], .stMultiSelect span[title] { color:ON_FILL !important; }
/* A table's own export keeps cells that a spreadsheet would run; ours does not. */
.stElementToolbar button[aria-label="Download as CSV"] { display:none; }
.st-key-next a { border:1px solid ACCENT; }
.cv-line { display:flex; flex-wrap:wrap; gap:.2rem 1rem; align-items:baseline; }
.cv-name { font-weight:600; overflow-wrap:anywhere; }
.cv-muted { opacity:.68; font-size:.9rem; }
.cv-dot { display:inline-block; width:.62rem; height:.62rem; border-radius:50%;
  background:#8a9694; }
.cv-dot.cv-work { background:ACCENT; animation:cv-pulse 1.6s ease-in-out infinite; }
.cv-dot.cv-done { background:ACCENT; }
.cv-dot.cv-bad { background:#d55e00; }
@keyframes cv-pulse { 50% { opacity:.3; } }
@media (prefers-reduced-motion: reduce) { .cv-dot.cv-work { animation:none; } }
.cv-big { font-size:1.55rem; font-weight:650; line-height:1.25; }
.cv-side { display:flex; gap:1.4rem; align-items:center; }
.cv-fact { display:grid; grid-template-columns:5.4rem 1fr; gap:.15rem .9rem;
  align-content:start; }
.cv-fact b { font-variant-numeric:tabular-nums; }
.cv-accent { color:ACCENT; }
.cv-stack { display:flex; flex-direction:column; gap:2px; flex:0 0 5rem;
  font-size:.72rem; }
.cv-stack div { border-radius:3px; text-align:center; overflow:hidden; line-height:1.35; }
.cv-kept { background:ACCENT; }
.cv-gone { background:currentColor; opacity:.13; }
.cv-chip { border:2px solid ACCENT; color:ACCENT; font-weight:650; }
.cv-embed { border:1px solid currentColor; opacity:.7; }
.cv-words { font-size:1.12rem; line-height:2.05; overflow-wrap:anywhere; white-space:pre-wrap; }
.cv-words .cv-t { border-radius:4px; padding:.14em 0; color:#16201f; }
.cv-words .cv-frame { opacity:.6; font-family:monospace; font-size:.88em;
  margin-right:.3em; }
.cv-words .cv-rest { opacity:.45; text-decoration:line-through; }
.cv-grid { display:grid; gap:1rem; grid-template-columns:repeat(auto-fill, minmax(150px, 1fr)); }
.cv-figure { margin:0; }
.cv-figure img { border-radius:6px; display:block; max-width:100%; }
.cv-figure figcaption { font-size:.88rem; opacity:.8; overflow-wrap:anywhere; padding-top:.3rem; }
.cv-key { display:inline-block; border-radius:4px; padding:.05rem .5rem; color:#16201f;
  margin:0 .3rem .3rem 0; font-size:.88rem; overflow-wrap:anywhere; }
.cv-texts { font-size:.86rem; padding-left:1.2rem; margin:.2rem 0 0; overflow-wrap:anywhere; }
.cv-bars { display:grid; grid-template-columns:minmax(4rem,12rem) 1fr 3.6rem; gap:.35rem .7rem;
  align-items:center; }
.cv-prompt { border-left:3px solid rgba(128,140,138,.3); padding:.1rem 0 .1rem .9rem;
  margin:0 0 1rem; }
.cv-read { font-family:monospace; font-size:.92rem; white-space:pre-wrap; overflow-wrap:anywhere;
  unicode-bidi:isolate; line-height:1.6; }
.cv-left-out { font-family:monospace; font-size:.92rem; overflow-wrap:anywhere;
  unicode-bidi:isolate; margin:.2rem 0; }
.cv-left-out s { opacity:.55; white-space:pre-wrap; }
.cv-probed { background:none; color:inherit; font-weight:700; border:2px solid; border-radius:4px;
  padding:0 .2em; }
.cv-rules { overflow-x:auto; font-size:.86rem; }
.cv-rules table { border-collapse:collapse; font-variant-numeric:tabular-nums; }
.cv-rules th, .cv-rules td { text-align:left; padding:.25rem .8rem .25rem 0; white-space:nowrap;
  border-bottom:1px solid rgba(128,140,138,.25); font-weight:400; }
.cv-rules th[scope=col] { opacity:.68; }
.cv-rules tr.cv-here th, .cv-rules tr.cv-here td { font-weight:650; color:ACCENT; }
.cv-bars span { overflow-wrap:anywhere; }
.cv-bar { background:rgba(128,140,138,.2); border-radius:4px; height:.95rem; }
.cv-fact + .cv-bar { margin:.5rem 0; }
.cv-bar i { display:block; height:100%; border-radius:4px; background:ACCENT; }
"""


def sheet(look: Look) -> str:
    """The whole style element for a theme."""
    rules = _SHEET.replace("ACCENT", look.accent).replace("ON_FILL", look.on_accent)
    rules = rules.replace("MUTED", look.muted)
    probed = "".join(
        f".cv-p-{vector.name}{{border-color:{look.series(vector)}}}" for vector in SERIES
    )
    return f"<style>{rules}{probed}{_tints()}</style>"


def tint_class(slot: int, confidence: float) -> str:
    """The class that tints a word: colour by class slot, strength by confidence in [0, 1]."""
    strength = min(STRENGTHS - 1, int(max(confidence, 0.0) * STRENGTHS))
    return f"cv-c{slot}-{strength}"


def _tints() -> str:
    return "".join(
        f".cv-c{slot}-{step}{{background:{tint(colour, step / (STRENGTHS - 1))}}}"
        for slot, colour in enumerate(CLASS_COLOURS)
        for step in range(STRENGTHS)
    )
