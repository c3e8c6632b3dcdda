"""The version: of a release, or of the commit between two releases that this is.

A release is the commit with the tag `v` and `RELEASE`. What is made of any other commit comes before that release in
the order of versions and has the commit's time and hash: `0.1.0.dev20261128214212+gb31f92d`, with `.modified` at the
end if files were changed. Nothing is needed for this but git: no tags, no history, no package.
"""

import functools
import pathlib
import subprocess
import time

RELEASE = "0.1.0"  # the next one, or this one
_BUILT = ""  # in a wheel or an sdist, the whole version: `setup.py` writes it here
_ARCHIVED = "$Format:%ct %h %D$"  # in an archive that git or GitHub made of a commit, its time, hash and tags


@functools.cache
def version(root: pathlib.Path | None = None) -> str:
    """The version of this package.

    Args:
      root: of the checkout; by default the folder above the package.
    """
    if _BUILT:
        return _BUILT
    root = root or pathlib.Path(__file__).resolve().parent.parent
    if not _ARCHIVED.startswith("$"):
        return of_commit(_ARCHIVED)
    if not (root / ".git").exists():  # a copy of the files: nothing says which commit they are
        return f"{RELEASE}.dev0+unknown"
    commit = _git(root, "log", "-1", "--no-show-signature", "--decorate-refs=refs/tags/*", "--format=%ct %h %D")
    if commit is None:
        return f"{RELEASE}.dev0+unknown"
    changed = _git(root, "status", "--porcelain", "--untracked-files=no")
    return of_commit(commit, modified=bool(changed))


def of_commit(described: str, modified: bool = False) -> str:
    """The version of a commit.

    Args:
      described: `%ct %h %D` of `git log`: seconds since 1970, the hash, names that point to it.
      modified: whether its files were changed.
    """
    seconds, commit, names = [*described.split(" ", 2), ""][:3]
    if f"tag: v{RELEASE}" in names.split(", ") and not modified:
        return RELEASE
    when = time.strftime("%Y%m%d%H%M%S", time.gmtime(int(seconds)))
    return f"{RELEASE}.dev{when}+g{commit}" + (".modified" if modified else "")


def _git(root: pathlib.Path, *command: str) -> str | None:
    """What git says, or None if it is missing or refuses."""
    git = ("git", "--no-optional-locks", "-C", str(root))  # a commit that is being made is not disturbed
    try:
        done = subprocess.run([*git, *command], capture_output=True, text=True, timeout=5)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
