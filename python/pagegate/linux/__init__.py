"""A Linux to boot as a guest, for users who have none at hand: a kernel of a distribution, and an initrd with busybox.

Both are kept in a cache, `pagegate/guest` in $XDG_CACHE_HOME or ~/.cache:

    <release>_<version>/vmlinuz          a kernel, its configuration and, in lib/modules/<release>, its modules
    by-request/<request>                 a link to the kernel that was got for a request
    busybox                              a static busybox
    initramfs_<digest>.img               an initrd that was given no other place

    >>> from pagegate import linux
    >>> kernel = linux.fetch()                                                       # doctest: +SKIP
    >>> initrd = linux.build(command="uname -r", modules=["virtio_blk"], kernel=kernel.image)   # doctest: +SKIP
"""

from pagegate.linux.initramfs import build, write
from pagegate.linux.kernel import Kernel, fetch

__all__ = ["Kernel", "build", "fetch", "write"]
