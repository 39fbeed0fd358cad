//! Classes of clients: by what they are found, and what steers them.

use crate::class::{self, ClassEntry};

/// Key of `CLASS_TABLES`, of which the value is the [`Service`](super::Service) that steers the clients of a class
/// in place of the one at the address. Where there is none, that one does.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(C)]
pub struct TableKey {
    /// [`Service::id`](super::Service::id) of the one at the address.
    pub service: u32,
    /// Number of the class.
    pub class: u32,
}

/// Key of `CLASSES_V4`: a network of clients. The kernel finds the longest one that holds an
/// address.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[repr(C)]
pub struct NetworkV4 {
    /// How many bits of the address count.
    pub bits: u32,
    /// The address.
    pub addr_be: u32,
}

/// Key of `CLASSES_V6`, as [`NetworkV4`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[repr(C)]
pub struct NetworkV6 {
    /// How many bits of the address count.
    pub bits: u32,
    /// The address.
    pub addr_be: [u32; 4],
}

/// Value of `CLASSES_V4` and `CLASSES_V6`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(C)]
pub struct ClassState {
    /// What the program goes by.
    pub entry: ClassEntry,
    /// While it is tracked: seconds of `CLOCK_BOOTTIME` of the last change. For agents only.
    pub changed_s: u32,
}

/// Elements of `CLASSES_V4` and of `CLASSES_V6`. They take memory as they are used: there is room
/// for twice the networks that a configuration can have, and for those that are remembered.
pub const CLASS_NETWORKS: u32 = 1 << 22;
/// Elements of `CLASS_TABLES`.
pub const CLASS_TABLES: u32 = 1 << 13;
/// Elements of `CLASS_BLOCKS`: 64 blocks each, those of IPv4 first.
pub const CLASS_BLOCKS: u32 = 2 * class::BLOCKS / 64;

/// Whether what `CLASS_CHANGES` says, its only element, means that no class is changing just now.
/// It counts up before the first write of a change and again after the last one: odd numbers say
/// that all is written. What was looked up is true as long as the number stays the odd one that it
/// was before.
#[inline(always)]
pub const fn settled(changes: u64) -> bool {
    changes & 1 != 0
}
