"""Compiled templates in the disk cache, so that a kernel which is there loads without Jinja compiling anything.

They are kept as kernels are, and by the same rules: under a key of all that moves them, hashed, published whole, and read only
from files that nobody else can have written.  What they render is still what a kernel's own key is made of: a kernel is served
for the very text that this process would compile, whatever its templates came from.
"""

import hashlib

from mlagen import rendering
from mlagen.abi import ABI_VERSION
from mlagen.cache import DiskCache, Entry, Key

LAYOUT = "templates-v1"
"""Beside the kernels' own folder: these are not kernels, and are not counted as such."""


def template_cache(cache: DiskCache) -> DiskCache:
    """Where the compiled templates of `cache` are."""
    return DiskCache(cache.root, LAYOUT)


def template_key() -> Key:
    """What compiled templates depend on; not on the machine, nor on which kernel they are for."""
    source, compiler, options = rendering.identity()
    return Key("templates", "any", hashlib.sha256(source.encode()).hexdigest(), compiler, options, ABI_VERSION)


def prepare_templates(cache: DiskCache, *, publish: bool) -> None:
    """Have this process's templates compiled, unless they are: from `cache`, or by Jinja; `publish` leaves those in the cache.

    Raises MlagenError where the cache is not safe.
    """
    if rendering.any_compiled():
        return
    store = template_cache(cache)
    store.refuse_unsafe()
    key = template_key()
    found, _ = store.read(key)
    if found is None and publish:
        found = store.get(key, _compile)
    if found:
        rendering.use_compiled(found.binary)


def _compile() -> Entry:
    source, compiler, _ = rendering.identity()
    return Entry(rendering.compile_templates(), source, {"kernel": "templates", "compiler": compiler})
