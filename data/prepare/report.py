"""The report of a preparation: what the source holds, and which records were dropped."""

from __future__ import annotations

from dataclasses import dataclass

from data.prepare.dropped import DROPPED
from nb_lightning.token_source import SourceManifest


@dataclass
class Prepared:
    """A prepared source; `str` gives the report.

    Attributes:
        output: the source's folder or s3:// prefix.
        manifests: split -> its manifest; train's counts all dropped records.
        origins: reason -> the first few dropped records, as file:line.
        ignored: suffix -> number of files in input folders that were not read.
    """

    output: str
    manifests: dict[str, SourceManifest]
    origins: dict[str, list[str]]
    ignored: dict[str, int]

    def __str__(self) -> str:
        lines = [self.output]
        for name, m in self.manifests.items():
            count, kind = (m.documents // 2, "pairs") if m.pairs else (m.documents, "samples")
            kind = f"{kind}{m.trained:>20,} trained of" if m.is_chat else "documents"
            lines.append(f"  {name:<8}{count:>14,} {kind}{m.tokens:>20,} tokens{len(m.chunks):>8,} chunks")
        dropped = self.manifests["train"].dropped
        lines.append(f"  dropped {sum(dropped.values()):>14,} records" + (f", each in {DROPPED}" if dropped else ""))
        for reason, count in sorted(dropped.items()):
            shown = self.origins[reason]
            lines.append(f"{count:>24,} {reason}: {', '.join(shown)}{', ...' if count > len(shown) else ''}")
        if spelled := self.manifests["train"].spelled:
            lines.append(f"  as text {spelled:>14,} documents spell special tokens, which are text in them")
        if self.ignored:
            kinds = ", ".join(f"{suffix} {count:,}" for suffix, count in sorted(self.ignored.items()))
            lines.append(f"  not read{sum(self.ignored.values()):>14,} files of other kinds: {kinds}")
        if not self.manifests["val"].tokens:
            lines.append("  nothing was held out: raise --val-fraction to be able to validate on this source")
        return "\n".join(lines)
