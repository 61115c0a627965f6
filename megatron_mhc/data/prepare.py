"""The whole run: find the texts, write what is not yet written, publish it."""

from collections.abc import Callable

from megatron_mhc.data.documents import check_jsonl, chunks_of
from megatron_mhc.data.identity import differences, identity
from megatron_mhc.data.manifest import build_manifest, summary, train_flags
from megatron_mhc.data.megatron_io import indexed_dataset
from megatron_mhc.data.outputs import Outputs
from megatron_mhc.data.partial import Partial
from megatron_mhc.data.progress import progress
from megatron_mhc.data.settings import Settings
from megatron_mhc.data.shards import VALID, Counts, merge_shards, splits, write_shard
from megatron_mhc.data.sources import Found, find_sources
from megatron_mhc.data.stdlib_text import describe, find_stdlib
from megatron_mhc.data.tokenizers import Tokenizer, load_tokenizer
from megatron_mhc.errors import UserError


def prepare(settings: Settings, say: Callable[[str], None] = print) -> dict:
    """Write the pairs and the manifest that ``settings`` ask for, unless they are there.

    A killed run leaves its finished chunks in ``{output_prefix}.partial``; the next call with
    the same settings continues after them and gives the same bytes.

    Args:
        settings: what to read and to write.
        say: takes each line for the user.

    Returns:
        The manifest.

    Raises:
        UserError: a flag or an input is wrong, or the prefix holds something else; nothing
            was written.
        OSError: the disk is full or not writable; what is done stays for the next call.
    """
    outputs = Outputs(settings.output_prefix)
    partial = Partial(outputs.partial)
    tokenizer = load_tokenizer(settings.tokenizer)
    found = _find(settings, outputs)
    wanted = identity(settings, tokenizer, found)
    manifest = outputs.manifest()
    if manifest and not settings.overwrite and _is_prepared(outputs, partial, manifest, wanted):
        if partial.is_ours():
            with partial.locked(settings.output_prefix):
                partial.remove()
        say(f"already prepared: {summary(settings.output_prefix, manifest)}")
        return manifest
    resuming = _check_may_write(settings, outputs, partial, wanted)
    for source in found.sources:
        if source.is_jsonl:
            check_jsonl(source, settings.json_key)

    with partial.locked(settings.output_prefix):
        if not resuming:
            partial.clear()
        if not resuming or settings.overwrite:
            partial.set_plan(wanted, may_replace=settings.overwrite)
        counts, stems = _write_chunks(settings, tokenizer, found, partial, say)
        skipped = found.skipped + counts.skipped
        try:
            _check_counts(settings, counts)
        except UserError:
            partial.remove()
            raise
        merge_shards(partial.merged, stems, tokenizer, splits(settings))
        # From here on the files under the prefix may be this run's own.
        partial.set_plan(wanted, may_replace=True)
        manifest = outputs.publish(
            partial.merged, splits(settings), build_manifest(wanted, tokenizer, counts, skipped)
        )
        partial.remove()
    for reason, number in sorted(skipped.items()):
        say(f"warning: skipped {number} ({reason})")
    say(f"prepared: {summary(settings.output_prefix, manifest)}")
    say(f"train with: {train_flags(settings.output_prefix, manifest)}")
    return manifest


def _find(settings: Settings, outputs: Outputs) -> Found:
    found = find_sources(settings.inputs, outputs.contains)
    if settings.stdlib:
        library = find_stdlib(settings.required_bytes - found.size)
        found.sources += library.sources
        found.skipped += library.skipped
    if found.size >= settings.required_bytes:
        return found
    where = [*settings.inputs, *([f"--stdlib of {describe()}"] if settings.stdlib else [])]
    passed = ", ".join(f"{number} {reason}" for reason, number in sorted(found.skipped.items()))
    raise UserError(
        f"found {found.size} bytes of text in {', '.join(where)}"
        f"{f' (passed over: {passed})' if passed else ''}, "
        f"--min-bytes asks for {settings.required_bytes}: give more text or a smaller --min-bytes"
    )


def _is_prepared(outputs: Outputs, partial: Partial, manifest: dict, wanted: dict) -> bool:
    different = differences(manifest["settings"], wanted)
    if not different:
        damage = outputs.damage(manifest)
        if damage:
            raise UserError(
                f"--output-prefix {outputs.prefix}: {damage}; give --overwrite to build it again"
            )
        return True
    plan = partial.plan()
    # A killed --overwrite run goes on without the flag given again.
    if plan and plan["may_replace"] and not differences(plan["settings"], wanted):
        return False
    raise UserError(
        f"--output-prefix {outputs.prefix} holds data prepared otherwise: {different}; "
        "use another prefix, or give --overwrite to build it again"
    )


def _check_may_write(settings: Settings, outputs: Outputs, partial: Partial, wanted: dict) -> bool:
    """Whether an unfinished run is to be continued."""
    plan = partial.plan()
    different = differences(plan["settings"], wanted) if plan else ""
    if different and not settings.overwrite:
        raise UserError(
            f"--output-prefix {outputs.prefix}: {partial.folder} is an unfinished run prepared "
            f"otherwise: {different}; give its settings to continue it, or --overwrite to start "
            "afresh"
        )
    may_replace = settings.overwrite or (plan is not None and plan["may_replace"])
    if outputs.existing() and not may_replace:
        raise UserError(
            f"--output-prefix {outputs.prefix}: {outputs.existing()[0]} is there without a "
            "manifest of this tool; use another prefix, or give --overwrite to replace it"
        )
    return plan is not None and not different


def _write_chunks(
    settings: Settings,
    tokenizer: Tokenizer,
    found: Found,
    partial: Partial,
    say: Callable[[str], None],
) -> tuple[Counts, list[str]]:
    chunks = chunks_of(found.sources, settings.chunk_bytes)
    done = {number: partial.counts(number) for number in range(len(chunks))}
    done = {number: counts for number, counts in done.items() if counts}
    done_bytes = sum(span.end - span.start for number in done for span in chunks[number])
    if done:
        say(f"continuing: {len(done)} of {len(chunks)} chunks are done")
    # Before the clock of the progress bar starts: this takes seconds.
    indexed_dataset()
    total = Counts()
    with progress(found.size, done_bytes) as advance:
        for number, spans in enumerate(chunks):
            counts = done.get(number)
            if counts is None:
                counts = write_shard(partial.stem(number), spans, tokenizer, settings, advance)
                partial.set_counts(number, counts)
            total.add(counts)
    return total, [partial.stem(number) for number in range(len(chunks))]


def _check_counts(settings: Settings, counts: Counts) -> None:
    for split in splits(settings):
        if counts.documents[split]:
            continue
        total = counts.documents.total()
        if total == 0:
            raise UserError(
                f"no text is left of the inputs: skipped {dict(counts.skipped)}; "
                f"--tokenizer {settings.tokenizer} needs UTF-8 text"
            )
        other = "larger" if split == VALID else "smaller"
        raise UserError(
            f"--validation-fraction {settings.validation_fraction} left none of {total} documents "
            f"for {'validation' if split == VALID else 'training'}: use a {other} fraction, a "
            f"smaller --max-document-bytes (now {settings.max_document_bytes}), or 0 for no "
            "validation pair"
        )
