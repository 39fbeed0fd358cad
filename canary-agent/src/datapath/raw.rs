//! Maps as bytes: carrying over what this build has no types for.

use std::{
    io,
    os::fd::{AsFd as _, AsRawFd as _, OwnedFd},
    path::Path,
};

use aya::{
    Pod,
    maps::{MapData, MapInfo, MapType},
};

use super::links::bpf;

// Commands of bpf(2) (linux/bpf.h).
const BPF_MAP_LOOKUP_ELEM: libc::c_long = 1;
const BPF_MAP_UPDATE_ELEM: libc::c_long = 2;
const BPF_MAP_GET_NEXT_KEY: libc::c_long = 4;
/// Kernel 5.6, commit cb4d03ab499d; of per-CPU arrays 5.13, commit f008d732ab18.
pub(super) const BPF_MAP_LOOKUP_BATCH: libc::c_long = 24;

/// The part of `union bpf_attr` that commands on one element use.
#[repr(C)]
struct ElementAttr {
    map_fd: u32,
    pad: u32,
    key: u64,
    value: u64,
    flags: u64,
}

/// The part of `union bpf_attr` that commands on many elements use.
#[repr(C)]
#[derive(Default)]
pub(super) struct BatchAttr {
    pub(super) in_batch: u64,
    pub(super) out_batch: u64,
    pub(super) keys: u64,
    pub(super) values: u64,
    pub(super) count: u32,
    pub(super) map_fd: u32,
    pub(super) elem_flags: u64,
    pub(super) flags: u64,
}

/// Reads elements of a per-CPU array in a single call, from `first` on, as many as there is room for
/// in `values`: each has a value for each CPU, one after the other. Returns how many there are.
///
/// # Panics
/// When a value of the map is no `V`, or not a whole number of 64-bit words.
pub(super) fn elements<V: Pod>(map: &MapData, first: u32, values: &mut [V]) -> io::Result<usize> {
    let info = map.info().map_err(io::Error::other)?;
    let bytes = info.value_size() as usize;
    assert!(bytes == size_of::<V>() && bytes.is_multiple_of(8), "values of {bytes} bytes");
    assert!(matches!(info.map_type(), Ok(MapType::PerCpuArray)), "a per-CPU array");
    let count = values.len() / super::pins::cpus() as usize;
    // Behind the last one it would begin anew.
    if first >= info.max_entries() {
        return Ok(0);
    }
    let mut keys = vec![0_u32; count];
    // It begins behind this one, or at the first.
    let before = first.wrapping_sub(1);
    let mut last = 0_u32;
    let mut attr = BatchAttr {
        in_batch: if first == 0 { 0 } else { &raw const before as u64 },
        out_batch: &raw mut last as u64,
        keys: keys.as_mut_ptr() as u64,
        values: values.as_mut_ptr() as u64,
        count: count as u32,
        map_fd: map.fd().as_fd().as_raw_fd() as u32,
        ..BatchAttr::default()
    };
    match bpf(BPF_MAP_LOOKUP_BATCH, &mut attr) {
        Ok(_) => {}
        // There are no more.
        Err(e) if e.raw_os_error() == Some(libc::ENOENT) => {}
        Err(e) => return Err(e),
    }
    Ok(attr.count as usize)
}

/// A pinned map whose keys and values are bytes.
pub(super) struct RawMap {
    fd: OwnedFd,
    /// Elements that it has room for.
    pub(super) entries: u32,
    key_bytes: usize,
    /// Bytes of one value; of a per-CPU map, of one CPU's, rounded up as the kernel does.
    pub(super) value_bytes: usize,
    /// CPUs whose values an element has.
    pub(super) cpus: usize,
    array: bool,
}

impl RawMap {
    /// Opens a pinned map.
    pub(super) fn open(pin: &Path) -> Result<Self, super::Error> {
        let info = MapInfo::from_pin(pin)?;
        let kind = info.map_type()?;
        let per_cpu = matches!(kind, MapType::PerCpuArray | MapType::PerCpuHash);
        let value_bytes = info.value_size() as usize;
        Ok(Self {
            fd: MapData::from_pin(pin)?.fd().as_fd().try_clone_to_owned()?,
            entries: info.max_entries(),
            key_bytes: info.key_size() as usize,
            value_bytes: if per_cpu { value_bytes.next_multiple_of(8) } else { value_bytes },
            cpus: if per_cpu { super::pins::cpus() as usize } else { 1 },
            array: matches!(kind, MapType::Array | MapType::PerCpuArray),
        })
    }

    /// Bytes of all CPUs' values of an element.
    pub(super) const fn element_bytes(&self) -> usize {
        self.value_bytes * self.cpus
    }

    fn element(
        &self,
        command: libc::c_long,
        key: Option<&[u8]>,
        value: *mut u8,
    ) -> io::Result<bool> {
        let mut attr = ElementAttr {
            map_fd: self.fd.as_raw_fd() as u32,
            pad: 0,
            key: key.map_or(0, |key| key.as_ptr() as u64),
            value: value as u64,
            flags: 0,
        };
        match bpf(command, &mut attr) {
            Ok(_) => Ok(true),
            Err(e) if e.raw_os_error() == Some(libc::ENOENT) => Ok(false),
            Err(e) => Err(e),
        }
    }

    /// Reads an element. Says whether there is one.
    pub(super) fn get(&self, key: &[u8], value: &mut [u8]) -> io::Result<bool> {
        assert!(key.len() == self.key_bytes && value.len() == self.element_bytes());
        self.element(BPF_MAP_LOOKUP_ELEM, Some(key), value.as_mut_ptr())
    }

    /// Writes an element.
    pub(super) fn set(&self, key: &[u8], value: &[u8]) -> io::Result<()> {
        assert!(key.len() == self.key_bytes && value.len() == self.element_bytes());
        // The kernel only reads it.
        self.element(BPF_MAP_UPDATE_ELEM, Some(key), value.as_ptr().cast_mut()).map(drop)
    }

    /// Calls `each` with the key and the value of every element.
    pub(super) fn each(
        &self,
        mut each: impl FnMut(&[u8], &[u8]) -> Result<(), super::Error>,
    ) -> Result<(), super::Error> {
        let mut value = vec![0; self.element_bytes()];
        if self.array {
            for index in 0..self.entries {
                let key = index.to_ne_bytes();
                if self.get(&key, &mut value)? {
                    each(&key, &value)?;
                }
            }
            return Ok(());
        }
        let (mut key, mut next) = (None, vec![0; self.key_bytes]);
        while self.element(BPF_MAP_GET_NEXT_KEY, key.as_deref(), next.as_mut_ptr())? {
            if self.get(&next, &mut value)? {
                each(&next, &value)?;
            }
            key = Some(next.clone());
        }
        Ok(())
    }
}
