//! The few BPF commands that aya has no words for: programs and maps without an
//! object file, runs that say where a packet came in and how often it is run, and
//! clearing a map of any kind.

use std::{
    ffi::CString,
    io,
    os::{
        fd::{AsFd as _, AsRawFd as _, BorrowedFd, FromRawFd as _, OwnedFd},
        unix::ffi::OsStrExt as _,
    },
    path::Path,
};

use aya::{
    maps::{MapData, MapType},
    util::nr_cpus,
};

/// `BPF_MAP_CREATE` (linux/bpf.h).
const BPF_MAP_CREATE: libc::c_long = 0;
/// `BPF_OBJ_PIN` (linux/bpf.h).
const BPF_OBJ_PIN: libc::c_long = 6;
/// `BPF_MAP_LOOKUP_ELEM` (linux/bpf.h).
const BPF_MAP_LOOKUP_ELEM: libc::c_long = 1;
/// `BPF_MAP_UPDATE_ELEM` (linux/bpf.h).
const BPF_MAP_UPDATE_ELEM: libc::c_long = 2;
/// `BPF_MAP_DELETE_ELEM` (linux/bpf.h).
const BPF_MAP_DELETE_ELEM: libc::c_long = 3;
/// `BPF_MAP_GET_NEXT_KEY` (linux/bpf.h).
const BPF_MAP_GET_NEXT_KEY: libc::c_long = 4;
/// `BPF_PROG_LOAD` (linux/bpf.h).
const BPF_PROG_LOAD: libc::c_long = 5;
/// `BPF_PROG_TEST_RUN` (linux/bpf.h; kernel 4.12, commit 1cf1cae963c2).
const BPF_PROG_TEST_RUN: libc::c_long = 10;
/// `BPF_PROG_TYPE_XDP` (linux/bpf.h).
const BPF_PROG_TYPE_XDP: u32 = 6;
/// `BPF_XDP` (linux/bpf.h): what aya loads programs for, which those that call each other have to
/// have in common.
const BPF_XDP: u32 = 37;

/// `BPF_MAP_FREEZE` (linux/bpf.h; kernel 5.2, commit 87df15de441b).
const BPF_MAP_FREEZE: libc::c_long = 22;

/// The part of `union bpf_attr` for elements of maps.
#[repr(C)]
#[derive(Default)]
struct ElementAttr {
    map_fd: u32,
    pad: u32,
    key: u64,
    value_or_next_key: u64,
    flags: u64,
}

/// The part of `union bpf_attr` that `BPF_PROG_LOAD` needs.
#[repr(C)]
#[derive(Default)]
struct LoadAttr {
    prog_type: u32,
    insn_cnt: u32,
    insns: u64,
    license: u64,
    log_level: u32,
    log_size: u32,
    log_buf: u64,
    kern_version: u32,
    prog_flags: u32,
    prog_name: [u8; 16],
    prog_ifindex: u32,
    expected_attach_type: u32,
}

/// The part of `union bpf_attr` that `BPF_PROG_TEST_RUN` uses.
#[repr(C)]
#[derive(Default)]
struct TestRunAttr {
    prog_fd: u32,
    retval: u32,
    data_size_in: u32,
    data_size_out: u32,
    data_in: u64,
    data_out: u64,
    repeat: u32,
    duration: u32,
    ctx_size_in: u32,
    ctx_size_out: u32,
    ctx_in: u64,
    ctx_out: u64,
    flags: u32,
    cpu: u32,
    batch_size: u32,
    pad: u32,
}

/// `struct xdp_md` (linux/bpf.h).
#[repr(C)]
#[derive(Default)]
struct XdpMd {
    data: u32,
    data_end: u32,
    data_meta: u32,
    ingress_ifindex: u32,
    rx_queue_index: u32,
    egress_ifindex: u32,
}

/// What a run came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Run {
    /// The program's answer, one of `XDP_*`.
    pub action: u32,
    /// Bytes of the frame afterwards.
    pub len_bytes: usize,
    /// How long the kernel says the program ran, in nanoseconds.
    pub duration_ns: u32,
}

/// Calls the system call with a command's attributes.
///
/// # Safety
/// Every pointer in `attr` must be valid for what the command does with it.
unsafe fn bpf<T>(command: libc::c_long, attr: &mut T) -> io::Result<libc::c_long> {
    // SAFETY: `attr` lives through the call; its pointers are the caller's promise.
    let result = unsafe { libc::syscall(libc::SYS_bpf, command, attr, size_of::<T>()) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

/// Brings a map of any kind to what it was when it was made: an array's elements to zero on every
/// CPU, other maps to no entry.
///
/// # Errors
/// When the kernel refuses to read or write.
pub fn clear(map: &MapData) -> io::Result<()> {
    let info = map.info().map_err(io::Error::other)?;
    let kind = info.map_type().map_err(io::Error::other)?;
    let fd = map.fd().as_fd().as_raw_fd() as u32;
    if matches!(kind, MapType::Array | MapType::PerCpuArray) {
        let cpus = match kind {
            MapType::PerCpuArray => nr_cpus().map_err(|(_, error)| error)?,
            _ => 1,
        };
        let zero = vec![0_u8; info.value_size().next_multiple_of(8) as usize * cpus];
        for index in 0..info.max_entries() {
            let mut attr = ElementAttr {
                map_fd: fd,
                key: &raw const index as u64,
                value_or_next_key: zero.as_ptr() as u64,
                ..ElementAttr::default()
            };
            // SAFETY: key and value are memory that outlives the call, of the map's sizes: those
            // of a value for each CPU, in multiples of eight bytes.
            unsafe { bpf(BPF_MAP_UPDATE_ELEM, &mut attr)? };
        }
        return Ok(());
    }
    let mut key = vec![0_u8; info.key_size() as usize];
    loop {
        // Without a key: the first one.
        let mut next = ElementAttr {
            map_fd: fd,
            value_or_next_key: key.as_mut_ptr() as u64,
            ..ElementAttr::default()
        };
        // SAFETY: the kernel writes a key to where there is room for one.
        match unsafe { bpf(BPF_MAP_GET_NEXT_KEY, &mut next) } {
            Ok(_) => {}
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => return Ok(()),
            Err(error) => return Err(error),
        }
        let mut attr =
            ElementAttr { map_fd: fd, key: key.as_ptr() as u64, ..ElementAttr::default() };
        // SAFETY: `key` is a key of the map's and outlives the call.
        unsafe { bpf(BPF_MAP_DELETE_ELEM, &mut attr)? };
    }
}

/// Every key of a map and its value: where each CPU has one, all of them, one after the other.
///
/// # Errors
/// When the kernel refuses to read, or the map is one that nothing can be looked up in.
pub fn elements(map: &MapData) -> io::Result<Vec<(Vec<u8>, Vec<u8>)>> {
    let info = map.info().map_err(io::Error::other)?;
    let kind = info.map_type().map_err(io::Error::other)?;
    let (key_bytes, mut value_bytes) = (info.key_size() as usize, info.value_size() as usize);
    if matches!(kind, MapType::PerCpuArray | MapType::PerCpuHash | MapType::LruPerCpuHash) {
        value_bytes = value_bytes.next_multiple_of(8) * nr_cpus().map_err(|(_, error)| error)?;
    }
    let map_fd = map.fd().as_fd().as_raw_fd() as u32;
    let (mut all, mut key) = (Vec::new(), None::<Vec<u8>>);
    loop {
        let mut next = vec![0; key_bytes];
        let mut attr = ElementAttr {
            map_fd,
            key: key.as_ref().map_or(0, |key| key.as_ptr() as u64),
            value_or_next_key: next.as_mut_ptr() as u64,
            ..ElementAttr::default()
        };
        // SAFETY: both keys are memory that outlives the call, of the map's size.
        match unsafe { bpf(BPF_MAP_GET_NEXT_KEY, &mut attr) } {
            Ok(_) => {}
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => return Ok(all),
            Err(error) => return Err(error),
        }
        let mut value = vec![0; value_bytes];
        match lookup(map.fd().as_fd(), &next, &mut value) {
            Ok(()) => all.push((next.clone(), value)),
            // An array of programs has keys without a value.
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => {}
            Err(error) => return Err(error),
        }
        key = Some(next);
    }
}

/// Reads an element of a map, into memory as long as all of its value.
///
/// # Errors
/// When the kernel refuses to read, or there is no such element.
pub fn lookup(map: BorrowedFd<'_>, key: &[u8], value: &mut [u8]) -> io::Result<()> {
    let mut attr = ElementAttr {
        map_fd: map.as_raw_fd() as u32,
        key: key.as_ptr() as u64,
        value_or_next_key: value.as_mut_ptr() as u64,
        ..ElementAttr::default()
    };
    // SAFETY: key and value are memory that outlives the call; that they are of the map's sizes
    // is the caller's promise.
    unsafe { bpf(BPF_MAP_LOOKUP_ELEM, &mut attr)? };
    Ok(())
}

/// The sum over all CPUs of a counter in a per-CPU array of 64-bit integers. `values` has a place
/// for each of them: whoever asks often has it ready.
///
/// # Errors
/// When the kernel refuses to read.
pub fn per_cpu_sum(map: &MapData, index: u32, values: &mut [u64]) -> io::Result<u64> {
    let mut attr = ElementAttr {
        map_fd: map.fd().as_fd().as_raw_fd() as u32,
        key: &raw const index as u64,
        value_or_next_key: values.as_mut_ptr() as u64,
        ..ElementAttr::default()
    };
    // SAFETY: key and values are memory that outlives the call, of the map's sizes.
    unsafe { bpf(BPF_MAP_LOOKUP_ELEM, &mut attr)? };
    Ok(values.iter().sum())
}

/// Has the kernel refuse every further write to a map from outside.
///
/// # Errors
/// When the kernel refuses that.
pub fn freeze(map: &MapData) -> io::Result<()> {
    let mut map_fd = map.fd().as_fd().as_raw_fd() as u32;
    // SAFETY: no pointer is in it.
    unsafe { bpf(BPF_MAP_FREEZE, &mut map_fd)? };
    Ok(())
}

/// The part of `union bpf_attr` that `BPF_MAP_CREATE` needs.
#[repr(C)]
struct CreateAttr {
    kind: u32,
    key_bytes: u32,
    value_bytes: u32,
    entries: u32,
    flags: u32,
}

/// Makes a map.
///
/// # Errors
/// When the kernel refuses it.
pub fn create(
    kind: MapType,
    key_bytes: u32,
    value_bytes: u32,
    entries: u32,
) -> io::Result<OwnedFd> {
    create_with(CreateAttr { kind: kind as u32, key_bytes, value_bytes, entries, flags: 0 })
}

fn create_with(mut attr: CreateAttr) -> io::Result<OwnedFd> {
    // SAFETY: no pointer is in it.
    let fd = unsafe { bpf(BPF_MAP_CREATE, &mut attr)? };
    // SAFETY: the kernel has just made this descriptor for us.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) })
}

/// Writes an element of a map of [`create`]'s, which is not per CPU.
///
/// # Errors
/// When the kernel refuses to write.
///
/// # Panics
/// When key or value are not as long as the map's.
pub fn update(map: BorrowedFd<'_>, key: &[u8], value: &[u8]) -> io::Result<()> {
    Writer::new(map)?.write(key, value)
}

/// Writes many elements of such a map.
pub struct Writer<'a> {
    map: BorrowedFd<'a>,
    key_bytes: usize,
    value_bytes: usize,
}

impl<'a> Writer<'a> {
    /// Asks what the map's sizes are.
    ///
    /// # Errors
    /// When the kernel refuses to say.
    pub fn new(map: BorrowedFd<'a>) -> io::Result<Self> {
        let copy = map.try_clone_to_owned()?;
        let info = MapData::from_fd(copy).and_then(|map| map.info()).map_err(io::Error::other)?;
        let (key_bytes, value_bytes) = (info.key_size() as usize, info.value_size() as usize);
        Ok(Self { map, key_bytes, value_bytes })
    }

    /// Writes an element.
    ///
    /// # Errors
    /// When the kernel refuses to write.
    ///
    /// # Panics
    /// When key or value are not as long as the map's.
    pub fn write(&self, key: &[u8], value: &[u8]) -> io::Result<()> {
        assert_eq!((key.len(), value.len()), (self.key_bytes, self.value_bytes));
        let mut attr = ElementAttr {
            map_fd: self.map.as_raw_fd() as u32,
            key: key.as_ptr() as u64,
            value_or_next_key: value.as_ptr() as u64,
            ..ElementAttr::default()
        };
        // SAFETY: key and value are memory that outlives the call, of the map's sizes.
        unsafe { bpf(BPF_MAP_UPDATE_ELEM, &mut attr)? };
        Ok(())
    }
}

/// Makes an array of values of `value_bytes` that can be mapped, and pins it at `path`.
///
/// # Errors
/// When the kernel refuses it, or the path is taken or on no BPF file system.
pub fn pin_array(path: &Path, value_bytes: u32, entries: u32) -> io::Result<()> {
    /// The part of `union bpf_attr` that `BPF_OBJ_PIN` needs.
    #[repr(C)]
    struct PinAttr {
        path: u64,
        fd: u32,
        flags: u32,
    }
    const MMAPABLE: u32 = 1 << 10;
    let kind = MapType::Array as u32;
    let fd = create_with(CreateAttr { kind, key_bytes: 4, value_bytes, entries, flags: MMAPABLE })?;
    let path = CString::new(path.as_os_str().as_bytes())?;
    let mut attr = PinAttr { path: path.as_ptr() as u64, fd: fd.as_raw_fd() as u32, flags: 0 };
    // SAFETY: the path lives through the call.
    unsafe { bpf(BPF_OBJ_PIN, &mut attr)? };
    Ok(())
}

/// Loads an XDP program.
///
/// # Errors
/// When the kernel refuses it, with what its verifier says, or for want of rights.
pub fn load(instructions: &[u64]) -> io::Result<OwnedFd> {
    let mut log = vec![0_u8; 64 << 10];
    let mut attr = LoadAttr {
        prog_type: BPF_PROG_TYPE_XDP,
        insn_cnt: instructions.len() as u32,
        insns: instructions.as_ptr() as u64,
        license: c"GPL".as_ptr() as u64,
        log_level: 1,
        log_size: log.len() as u32,
        log_buf: log.as_mut_ptr() as u64,
        expected_attach_type: BPF_XDP,
        ..LoadAttr::default()
    };
    // SAFETY: all pointers are to memory that outlives the call, of the size that is said.
    match unsafe { bpf(BPF_PROG_LOAD, &mut attr) } {
        // SAFETY: the kernel has just made this descriptor for us.
        Ok(fd) => Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) }),
        Err(error) => {
            let said = String::from_utf8_lossy(&log);
            let said = said.trim_end_matches('\0').trim();
            Err(io::Error::new(error.kind(), format!("{error}\n{said}")))
        }
    }
}

/// Loads `return XDP_PASS`, the program that others are measured against.
///
/// # Errors
/// When the kernel refuses it, for want of rights above all.
pub fn load_empty() -> io::Result<OwnedFd> {
    // r0 = XDP_PASS; exit
    load(&[0x0000_0002_0000_00b7, 0x95])
}

/// Runs an XDP program once on `frame`, which came in by `ifindex` (the
/// loopback interface for `None`), and leaves the result in `out`.
///
/// # Errors
/// When the kernel refuses: a frame under 14 bytes, a result longer than `out`.
pub fn run(
    program: BorrowedFd<'_>,
    frame: &[u8],
    ifindex: Option<u32>,
    out: &mut [u8],
) -> io::Result<Run> {
    run_times(program, frame, ifindex, out, 1)
}

/// The same several times in one call: the frame as it is given is the first run's, that of each
/// other one is what the run before has made of it. The time is a single run's, rounded down.
///
/// # Errors
/// As [`run`].
pub fn run_times(
    program: BorrowedFd<'_>,
    frame: &[u8],
    ifindex: Option<u32>,
    out: &mut [u8],
    times: u32,
) -> io::Result<Run> {
    let context = XdpMd {
        data_end: frame.len() as u32,
        ingress_ifindex: ifindex.unwrap_or(0),
        ..XdpMd::default()
    };
    let mut attr = TestRunAttr {
        prog_fd: program.as_raw_fd() as u32,
        data_size_in: frame.len() as u32,
        data_in: frame.as_ptr() as u64,
        data_size_out: out.len() as u32,
        data_out: out.as_mut_ptr() as u64,
        repeat: times,
        ..TestRunAttr::default()
    };
    if ifindex.is_some() {
        attr.ctx_in = &raw const context as u64;
        attr.ctx_size_in = size_of::<XdpMd>() as u32;
    }
    // SAFETY: every pointer is to memory that outlives the call, of the size that is said.
    unsafe { bpf(BPF_PROG_TEST_RUN, &mut attr)? };
    Ok(Run {
        action: attr.retval,
        len_bytes: attr.data_size_out as usize,
        duration_ns: attr.duration,
    })
}

/// Has the kernel make `frames` frames, which the program fills and sends on: those come in
/// nowhere and go through drivers and other hosts as real ones do. Each is as long as `room`, and
/// what is in it is what its last owner has left.
///
/// # Errors
/// When the kernel refuses: live frames need kernel 5.18.
pub fn send_live(program: BorrowedFd<'_>, room: &[u8], frames: u32) -> io::Result<()> {
    /// `BPF_F_TEST_XDP_LIVE_FRAMES` (linux/bpf.h; kernel 5.18, commit b530e9e1063e).
    const LIVE_FRAMES: u32 = 1 << 1;
    let mut attr = TestRunAttr {
        prog_fd: program.as_raw_fd() as u32,
        data_size_in: room.len() as u32,
        data_in: room.as_ptr() as u64,
        repeat: frames,
        flags: LIVE_FRAMES,
        batch_size: 64,
        ..TestRunAttr::default()
    };
    // SAFETY: the only pointer is to memory of the size that is said, which the kernel reads.
    unsafe { bpf(BPF_PROG_TEST_RUN, &mut attr)? };
    Ok(())
}
