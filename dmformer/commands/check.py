"""``dmformer check``."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dmformer.commands import _options as options
from dmformer.commands import _present as present
from dmformer.errors import CheckFailed

if TYPE_CHECKING:
    from dmformer.bundle.integrity import IntegrityReport


def check(
    bundle: options.BundleArgument = None,
    json_file: options.JsonOption = None,
    require_signature: options.RequireSignatureOption = False,
    trusted_keys: options.TrustedKeysOption = None,
    debug: options.DebugOption = False,
) -> None:
    """Check a bundle's integrity: every file by its hash, the manifest by its signature; and say what that proves."""
    from dmformer.bundle.integrity import check_integrity

    path = options.bundle_path(bundle)
    report = check_integrity(path)
    _show(report, str(path), json_file)
    present.write_json(report, json_file)
    if not report.passed:
        raise CheckFailed(f"{path}: {_wrong(report)}")


def _show(report: IntegrityReport, name: str, json_file: str | None) -> None:
    failed = [file for file in report.files if not file.passed]
    if failed:
        listing = present.table(f"Bundle {name}", ["", "file", "what is wrong"])
        for file in failed:
            present.add_row(listing, [present.mark(False, "FAILED"), file.path, file.reason or ""])
        present.show(listing, json_file)
    held = len(report.files) - len(failed)
    present.show(f"files      {held} of {len(report.files)} are what manifest.json lists", json_file)
    present.show(f"manifest   SHA-256 {report.manifest_sha256}", json_file)
    signature = report.signature
    known = signature.trusted_as or signature.reason
    key = f", key {signature.fingerprint}" if signature.fingerprint else ""
    present.show(f"signature  {signature.status}{key}{f' ({known})' if known else ''}", json_file)
    present.show(f"It proves: {report.proves}.", json_file)


def _wrong(report: IntegrityReport) -> str:
    for file in report.files:
        if not file.passed:
            return f"{file.path}: {file.reason}"
    if report.signature.reason is not None:
        return report.signature.reason
    return f"signature: {report.signature.status}; expected one of a trusted key, which is required here"
