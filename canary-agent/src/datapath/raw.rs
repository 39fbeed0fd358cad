//! Maps as bytes: carrying over what this build has no types for.

use std::{
    io,
    os::fd::{AsFd as _, AsRawFd as _, OwnedFd},
    path::Path,
};

use aya::maps::{MapData, MapInfo, MapType};

use super::links::bpf;

// Commands of bpf(2) (linux/bpf.h).
const BPF_MAP_LOOKUP_ELEM: libc::c_long = 1;
const BPF_MAP_UPDATE_ELEM: libc::c_long = 2;
const BPF_MAP_GET_NEXT_KEY: libc::c_long = 4;

/// The part of `union bpf_attr` that commands on one element use.
#[repr(C)]
struct ElementAttr {
    map_fd: u32,
    pad: u32,
    key: u64,
    value: u64,
    flags: u64,
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
