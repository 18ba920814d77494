"""What stands where on the page, and the words around each figure."""

from __future__ import annotations

from sigma_lite import figures
from sigma_lite.figures import series
from sigma_lite.figures.series import Entries
from sigma_lite.report import markup
from sigma_lite.report.after import after_section
from sigma_lite.report.document import Plot, Section
from sigma_lite.report.headlines import n_experts
from sigma_lite.report.known import known_section
from sigma_lite.report.planned import comparison
from sigma_lite.report.provenance import commands, configuration, diary, sizes

PROVENANCE = commands, sizes, configuration, diary


def sections_of(entries: Entries) -> list[Section]:
    return [
        _learning(entries),
        _balance(entries),
        _sparsity(entries),
        _machine(entries),
        Section("planned", "Planned and measured", "", (comparison(entries),)),
        *known_section(entries),
        *after_section(entries),
        Section("samples", "Samples", "", (_samples(entries),)),
        Section("provenance", "How to repeat this run", "", tuple(make(entries) for make in PROVENANCE)),
    ]


def _learning(entries: Entries) -> Section:
    bits = "Nats per token depend on the tokenizer, bits per byte do not: they compare with any model and any compressor."
    raw = "Each term as it is, before its weight."
    raw += " The balance loss alone does not say that loads are even: see below." if n_experts(entries) > 1 else ""
    weighted = "The same terms after their weights, which is what the optimizer sees."
    return Section(
        "learning",
        "What it learned",
        "",
        (
            Plot("bits", figures.bits_per_byte(entries), bits),
            Plot("losses", figures.losses(entries), raw),
            Plot("weighted", figures.weighted_losses(entries), weighted),
        ),
    )


def _balance(entries: Entries) -> Section:
    title = "Which experts work"
    if n_experts(entries) == 1:
        return Section("balance", title, "This run is dense: one expert in each layer gets every token.", ())
    loads = series.windows(entries)
    if not loads:
        return Section("balance", title, "", (Plot("band", figures.deviation_band(entries), ""),))
    text = (
        "The share f of an expert is the fraction of (token, slot) pairs that it gets in a window; its probability P is"
        " the mean of its router probability over the same tokens. Its load deviation is E · f − 1."
    )
    return Section("balance", title, text, (*_loads(entries, loads[-1]), *_by_layer(entries, loads[-1])))


def _loads(entries: Entries, latest: dict) -> tuple:
    """The pictures of figure 2 of the Sigma-MoE-Tiny report, and every expert at once."""
    band = "Read it like figure 2a of the Sigma-MoE-Tiny report: the band is as wide as the load is uneven."
    shares = "Bars are shares, dots are probabilities. Where either is flat, the balance loss is 1 whatever the other does."
    heat = "Move the slider through the windows of the run. Sorted by load, an even layer is one flat colour."
    pair = [Plot("share-first", figures.share_and_probability(latest, 0, sort=True), shares)]
    deep = series.deep_layer(len(latest["f"]))
    if deep:
        caption = "The same for a deep layer; its experts are sorted by its own shares."
        pair.append(Plot("share-deep", figures.share_and_probability(latest, deep, sort=True), caption))
    return (
        Plot("band", figures.deviation_band(entries), band),
        tuple(pair),
        Plot("heatmap", figures.load_heatmap(entries), heat),
    )


def _by_layer(entries: Entries, latest: dict) -> tuple:
    spot = "A dot high up near 1 is a layer whose uneven load the balance loss does not see."
    dead = "Its weights get no gradient from text: only the router can bring it back."
    return (
        (
            Plot("blind-spot", figures.blind_spot(latest), spot),
            Plot("balance-loss", figures.balance_loss_by_layer(entries), "Its mean over layers is the balance loss."),
        ),
        (
            Plot("dead", figures.dead_experts(entries), dead),
            Plot("load-entropy", figures.load_entropy(entries), "The dashed line is an even load."),
        ),
        Plot("router-entropy", figures.router_entropy(entries), "Falls as the router becomes sure of single tokens."),
    )


def _sparsity(entries: Entries) -> Section:
    k = "Progressive sparsification: low layers begin with more experts per token and drop to the target in one step."
    active = "Attention, router, norms and the chosen experts. Nothing is added or removed at a switch: only K changes."
    pair = Plot("k", figures.experts_per_token(entries), k), Plot("active", figures.active_parameters(entries), active)
    return Section("sparsity", "How sparse it is", "", (pair,))


def _machine(entries: Entries) -> Section:
    rates = "A gradient norm that climbs while the loss is still calm is worth a look."
    speed = "The median is the number at the head of the page."
    return Section(
        "optimisation",
        "Optimisation and speed",
        "",
        (
            Plot("optimisation", figures.optimisation(entries), rates),
            Plot("throughput", figures.throughput(entries), speed),
        ),
    )


def _samples(entries: Entries) -> str:
    found = series.of_kind(entries, "sample")
    if not found:
        return '<p class="absent">No sample recorded yet.</p>'
    latest = [entry for entry in found if entry["step"] == found[-1]["step"]]
    earlier = [entry for entry in found if entry["step"] != found[-1]["step"]]
    folded = markup.fold(f"{len(earlier)} earlier samples", "".join(map(_sample, earlier))) if earlier else ""
    return "".join(map(_sample, latest)) + folded


def _sample(entry: dict) -> str:
    prompt, text = entry.get("prompt") or "", entry.get("text") or ""
    words = f"<b>{markup.escape(prompt)}</b>{markup.escape(text.removeprefix(prompt))}"
    return (
        markup.paragraph(f"Step {entry['step']:,}; the prompt is bold.") + f'<pre class="sample" tabindex="0">{words}</pre>'
    )
