"""Pages of the site that are made from other files, and its limits: hooks that mkdocs.yml names."""

import json
import logging
import pathlib
import re
from collections import Counter

from mkdocs.structure.files import File
from pymdownx.slugs import slugify

LIMIT = 500 * 1024
CARDS, FIGURE = "<!-- cards -->", "<!-- memory figure -->"
log = logging.getLogger("mkdocs.hooks")


def on_files(files, config):
    """Adds the notebook as a page."""
    text = pathlib.Path(config.docs_dir, "tour.ipynb").read_text(encoding="utf-8")
    files.append(File.generated(config, "tour.md", content=notebook_page(json.loads(text))))
    return files


def on_page_markdown(markdown, page, config, files):
    """Fills the gallery and the figure, and lets tables stand in what unfolds."""
    if CARDS in markdown:
        results = pathlib.Path(config.docs_dir, "results.md").read_text(encoding="utf-8")
        markdown = markdown.replace(CARDS, gallery(results))
    if FIGURE in markdown:
        data = pathlib.Path(config.docs_dir, "assets/memory.json").read_text(encoding="utf-8")
        script = f'<script type="application/json">{data.strip()}</script>'
        markdown = markdown.replace(FIGURE, f'<div id="memory-figure">{script}</div>')
    # a folder is a page on the code host only
    markdown = markdown.replace("[results/](results)", "`docs/results`")
    return markdown.replace("<details>", '<details markdown="1">')


def on_post_page(output, page, config):
    """Drops blank lines and indentation outside code: a sixth of an API page."""
    parts = re.split(r"(<pre.*?</pre>)", output, flags=re.DOTALL)
    return "".join(part if part.startswith("<pre") else re.sub(r"\s*\n\s*", "\n", part) for part in parts)


def on_post_build(config):
    """Warns, which `--strict` makes an error, of pages that are too long to be fast."""
    for path in pathlib.Path(config.site_dir).rglob("*.html"):
        if path.stat().st_size > LIMIT:
            log.warning("%s has %d KiB, more than %d", path.name, path.stat().st_size // 1024, LIMIT // 1024)


def notebook_page(notebook):
    """A notebook as Markdown: text and code, without outputs."""
    cells = [(cell["cell_type"], "".join(cell["source"])) for cell in notebook["cells"]]
    parts = [text if kind == "markdown" else f"```python\n{text}\n```" for kind, text in cells]
    return "\n\n".join([*parts, "[This page as a notebook](tour.ipynb)"]) + "\n"


def gallery(results):
    """One card per section of results.md: picture, verdict, claim, command."""
    cards = [section_card(section) for section in re.split(r"^## ", results, flags=re.MULTILINE)[1:]]
    counts = Counter(verdict for verdict, _ in cards)
    told = ", ".join(f"{count} {verdict.lower()}" for verdict, count in counts.most_common())
    body = "\n".join(card for _, card in cards)
    return f'{len(cards)} studies: {told}.\n\n<div class="gallery" markdown="1">\n{body}\n</div>\n'


def section_card(section):
    """The verdict of a section, and its card."""
    title = section.split("\n", 1)[0]
    claim = re.search(r"^Claim: (.*)$", section, re.MULTILINE)
    verdict = re.search(r"^\*\*([\w ]+)\.\*\* (.*)$", section, re.MULTILINE)
    picture = re.search(r"^!\[.*\]\((.*)\)$", section, re.MULTILINE)
    command = re.findall(r"^- `(python -m memformer\.lab .*?)`", section, re.MULTILINE)
    if not (claim and verdict and picture and command):
        raise ValueError(f"section {title!r} of docs/results.md has no claim, verdict, picture or command")
    link = f"results.md#{slugify(case='lower')(title, '-')}"
    kind = verdict[1].lower().replace(" ", "-")
    return (
        verdict[1],
        f"""
<div class="card" markdown="1">

[![{title}]({picture[1]}){{ loading=lazy }}]({link})

### {title} {{ #{pathlib.Path(picture[1]).stem} }}

<span class="verdict {kind}">{verdict[1]}</span> {verdict[2]}

Claim: {claim[1]}

```bash
{command[-1]}
```

[All numbers and the commands of its runs]({link})

</div>""",
    )
