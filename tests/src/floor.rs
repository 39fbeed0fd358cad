//! The least that a program can do which sends packets on, written instruction by instruction:
//! what the real ones are compared with.

use std::{
    io,
    os::fd::{AsFd as _, AsRawFd as _, BorrowedFd, OwnedFd},
};

use aya::{
    maps::{MapData, MapType},
    util::nr_cpus,
};
use canary_agent::plan::Family;

use crate::bpf;

/// `bpf_map_lookup_elem` (linux/bpf.h).
pub(crate) const LOOKUP: i32 = 1;

/// `bpf_xdp_adjust_head` (linux/bpf.h).
const ADJUST_HEAD: i32 = 44;

/// `bpf_get_prandom_u32` (linux/bpf.h).
pub(crate) const PRANDOM: i32 = 7;

/// `bpf_tail_call` (linux/bpf.h).
const TAIL_CALL: i32 = 12;

/// `bpf_redirect` (linux/bpf.h).
const REDIRECT: i32 = 23;

/// A register, r0 to r10.
pub(crate) type Register = u8;

/// How many bytes are read or written: the size bits of an instruction.
#[derive(Clone, Copy)]
pub(crate) enum Width {
    U32 = 0x00,
    U16 = 0x08,
    U8 = 0x10,
    U64 = 0x18,
}

impl Width {
    const fn bytes(self) -> usize {
        match self {
            Self::U8 => 1,
            Self::U16 => 2,
            Self::U32 => 4,
            Self::U64 => 8,
        }
    }
}

/// The widths that `bytes` bytes are copied in, each with its place.
pub(crate) fn widths(bytes: usize) -> impl Iterator<Item = (Width, i16)> {
    let mut at = 0;
    std::iter::from_fn(move || {
        let width = [Width::U64, Width::U32, Width::U16, Width::U8]
            .into_iter()
            .find(|width| at + width.bytes() <= bytes)?;
        let here = i16::try_from(at).ok()?;
        at += width.bytes();
        Some((width, here))
    })
}

/// Instructions in a row (Documentation/bpf/standardization/instruction-set.rst). Whoever jumps
/// goes to [`Assembler::out`], the last ones.
#[derive(Default)]
pub(crate) struct Assembler {
    code: Vec<u64>,
    jumps: Vec<usize>,
}

impl Assembler {
    fn put(&mut self, code: u8, dst: Register, src: Register, offset: i16, value: i32) {
        self.code.push(
            u64::from(code)
                | u64::from(dst) << 8
                | u64::from(src) << 12
                | u64::from(offset.cast_unsigned()) << 16
                | u64::from(value.cast_unsigned()) << 32,
        );
    }

    /// `dst = value`
    pub(crate) fn set(&mut self, dst: Register, value: i32) {
        self.put(0xb7, dst, 0, 0, value);
    }

    /// `dst = src`
    pub(crate) fn copy(&mut self, dst: Register, src: Register) {
        self.put(0xbf, dst, src, 0, 0);
    }

    /// `dst += value`
    pub(crate) fn add(&mut self, dst: Register, value: i32) {
        self.put(0x07, dst, 0, 0, value);
    }

    /// `dst += src`
    pub(crate) fn add_register(&mut self, dst: Register, src: Register) {
        self.put(0x0f, dst, src, 0, 0);
    }

    /// `dst &= value`
    pub(crate) fn and(&mut self, dst: Register, value: i32) {
        self.put(0x57, dst, 0, 0, value);
    }

    /// `dst ^= value`
    pub(crate) fn xor(&mut self, dst: Register, value: i32) {
        self.put(0xa7, dst, 0, 0, value);
    }

    /// `dst >>= bits`
    pub(crate) fn shift_right(&mut self, dst: Register, bits: i32) {
        self.put(0x77, dst, 0, 0, bits);
    }

    /// `dst -= src`
    pub(crate) fn subtract(&mut self, dst: Register, src: Register) {
        self.put(0x1f, dst, src, 0, 0);
    }

    /// The low 16 bits of `dst` in network order, all others 0.
    pub(crate) fn big_endian_16(&mut self, dst: Register) {
        self.put(0xdc, dst, 0, 0, 16);
    }

    /// `dst = *(src + offset)`
    pub(crate) fn load(&mut self, width: Width, dst: Register, src: Register, offset: i16) {
        self.put(0x61 | width as u8, dst, src, offset, 0);
    }

    /// `*(dst + offset) = src`
    pub(crate) fn store(&mut self, width: Width, dst: Register, offset: i16, src: Register) {
        self.put(0x63 | width as u8, dst, src, offset, 0);
    }

    /// `*(dst + offset) += src`, atomically.
    pub(crate) fn add_atomically(&mut self, dst: Register, offset: i16, src: Register) {
        self.put(0xdb, dst, src, offset, 0);
    }

    /// `dst` is the map.
    pub(crate) fn map(&mut self, dst: Register, map: BorrowedFd<'_>) {
        self.put(0x18, dst, 1, 0, map.as_raw_fd());
        self.put(0, 0, 0, 0, 0);
    }

    /// `dst` is the address of the map's first value, an array's.
    pub(crate) fn value(&mut self, dst: Register, map: BorrowedFd<'_>) {
        self.put(0x18, dst, 2, 0, map.as_raw_fd());
        self.put(0, 0, 0, 0, 0);
    }

    /// Calls a helper.
    pub(crate) fn call(&mut self, helper: i32) {
        self.put(0x85, 0, 0, 0, helper);
    }

    /// To the end, if `dst > src`.
    pub(crate) fn out_if_above(&mut self, dst: Register, src: Register) {
        self.jumps.push(self.code.len());
        self.put(0x2d, dst, src, 0, 0);
    }

    /// To the end, if `dst == value`.
    pub(crate) fn out_if(&mut self, dst: Register, value: i32) {
        self.jumps.push(self.code.len());
        self.put(0x15, dst, 0, 0, value);
    }

    /// To the end, if `dst != value`.
    pub(crate) fn out_unless(&mut self, dst: Register, value: i32) {
        self.jumps.push(self.code.len());
        self.put(0x55, dst, 0, 0, value);
    }

    /// Leaves the packet, whose context is `context`, to the program of [`targets`].
    pub(crate) fn go_on(&mut self, context: Register, targets: BorrowedFd<'_>) {
        self.copy(1, context);
        self.map(2, targets);
        self.set(3, 0);
        self.call(TAIL_CALL);
    }

    /// Answers with `action`.
    pub(crate) fn exit(&mut self, action: u32) {
        self.set(0, action.cast_signed());
        self.put(0x95, 0, 0, 0, 0);
    }

    /// Sends the frame out of an interface.
    pub(crate) fn redirect(&mut self, ifindex: u32) {
        self.set(1, ifindex.cast_signed());
        self.set(2, 0);
        self.call(REDIRECT);
        self.put(0x95, 0, 0, 0, 0);
    }

    /// Where jumps go to: answers with `action`. Loads the program.
    pub(crate) fn out(mut self, action: u32) -> io::Result<OwnedFd> {
        let end = self.code.len();
        for at in std::mem::take(&mut self.jumps) {
            self.code[at] |= ((end - at - 1) as u64 & 0xffff) << 16;
        }
        self.exit(action);
        bpf::load(&self.code)
    }

    /// r6 is where the frame of the context in r1 begins; to the end, if it has fewer bytes.
    pub(crate) fn begin(&mut self, bytes: usize) {
        self.load(Width::U32, 6, 1, 0);
        self.load(Width::U32, 7, 1, 4);
        self.copy(2, 6);
        self.add(2, bytes as i32);
        self.out_if_above(2, 7);
    }

    /// The MAC addresses of the frame at r6 change places, and it goes back where it came from.
    fn send_back(mut self) -> io::Result<OwnedFd> {
        for (width, at) in [(Width::U32, 0), (Width::U16, 4)] {
            self.load(width, 1, 6, at);
            self.load(width, 2, 6, at + 6);
            self.store(width, 6, at, 2);
            self.store(width, 6, at + 6, 1);
        }
        self.exit(crate::loaded::XDP_TX);
        self.out(crate::loaded::XDP_PASS)
    }
}

/// Loads a program that sends every frame back with its MAC addresses swapped: what whoever
/// forwards has to do.
///
/// # Errors
/// When the kernel refuses it.
pub fn swap() -> io::Result<OwnedFd> {
    let mut code = Assembler::default();
    code.begin(14);
    code.send_back()
}

/// Loads a program that sends every frame out of another interface, with these MAC addresses: the
/// receiver's and the sender's.
///
/// # Errors
/// When the kernel refuses it.
pub fn redirect(ifindex: u32, [to, from]: [[u8; 6]; 2]) -> io::Result<OwnedFd> {
    let addresses = [to, from].concat();
    let mut code = Assembler::default();
    code.begin(14);
    for (word, at) in addresses.as_chunks::<4>().0.iter().zip([0, 4, 8]) {
        code.set(1, i32::from_ne_bytes(*word));
        code.store(Width::U32, 6, at, 1);
    }
    code.redirect(ifindex);
    code.out(crate::loaded::XDP_PASS)
}

/// A number that programs count up, one on each processor.
#[derive(Debug)]
pub(crate) struct Counter {
    map: MapData,
    cpus: usize,
}

impl Counter {
    pub(crate) fn new() -> io::Result<Self> {
        let map = bpf::create(MapType::PerCpuArray, 4, 8, 1)?;
        let cpus = nr_cpus().map_err(|(_, error)| error)?;
        Ok(Self { map: MapData::from_fd(map).map_err(io::Error::other)?, cpus })
    }

    /// One more; what r0 to r5 held is gone.
    pub(crate) fn count(&self, code: &mut Assembler) {
        code.set(1, 0);
        code.store(Width::U32, 10, -4, 1);
        code.map(1, self.map.fd().as_fd());
        code.copy(2, 10);
        code.add(2, -4);
        code.call(LOOKUP);
        code.out_if(0, 0);
        code.load(Width::U64, 1, 0, 0);
        code.add(1, 1);
        code.store(Width::U64, 0, 0, 1);
    }

    /// The sum of all processors'.
    pub(crate) fn read(&self) -> io::Result<u64> {
        bpf::per_cpu_sum(&self.map, 0, &mut vec![0; self.cpus])
    }
}

/// A program that counts and drops every frame but those by which neighbours find each other.
#[derive(Debug)]
pub struct Sink {
    program: OwnedFd,
    counter: Counter,
}

impl Sink {
    /// Loads it.
    ///
    /// # Errors
    /// When the kernel refuses map or program.
    pub fn new() -> io::Result<Self> {
        /// The protocol of neighbour discovery in an IPv6 header (IANA protocol numbers).
        const ICMPV6: i32 = 58;
        let counter = Counter::new()?;
        let mut code = Assembler::default();
        code.begin(22);
        code.load(Width::U16, 1, 6, 12);
        // The EtherType of ARP.
        code.out_if(1, u16::from_ne_bytes([8, 6]).into());
        // The next header of IPv6; of IPv4 a part of the fragment's offset, of which there is none.
        code.load(Width::U8, 1, 6, 20);
        code.out_if(1, ICMPV6);
        counter.count(&mut code);
        code.exit(crate::loaded::XDP_DROP);
        Ok(Self { program: code.out(crate::loaded::XDP_PASS)?, counter })
    }

    /// The program.
    pub fn program(&self) -> BorrowedFd<'_> {
        self.program.as_fd()
    }

    /// Frames that it has counted.
    ///
    /// # Errors
    /// When the kernel refuses to read.
    pub fn count(&self) -> io::Result<u64> {
        self.counter.read()
    }
}

/// Where addresses and ports of TCP and UDP lie in a frame without tags and options.
fn tuple(family: Family) -> std::ops::Range<usize> {
    match family {
        Family::V4 => 26..38,
        Family::V6 => 22..58,
    }
}

/// Loads the same, which before that looks the frame's addresses and ports up in a hash map that
/// has those of all `frames`; others pass.
///
/// # Errors
/// When the kernel refuses map or program.
///
/// # Panics
/// When a frame is shorter than its headers.
pub fn swap_and_look_up(family: Family, frames: &[Vec<u8>]) -> io::Result<OwnedFd> {
    let mut all = frames.iter();
    swap_and_look_up_of(family, frames.len(), |frame| {
        frame.clear();
        frame.extend(all.next().into_iter().flatten());
    })
}

/// The same for so many frames, each of which `next` writes in its turn.
///
/// # Errors
/// When the kernel refuses map or program.
///
/// # Panics
/// When a frame is shorter than its headers.
pub fn swap_and_look_up_of(
    family: Family,
    frames: usize,
    mut next: impl FnMut(&mut Vec<u8>),
) -> io::Result<OwnedFd> {
    let tuple = tuple(family);
    let entries = frames.next_power_of_two().max(1024) as u32;
    let map = bpf::create(MapType::Hash, tuple.len() as u32, 8, entries)?;
    let writer = bpf::Writer::new(map.as_fd())?;
    let mut frame = Vec::new();
    for _ in 0..frames {
        next(&mut frame);
        writer.write(&frame[tuple.clone()], &1_u64.to_ne_bytes())?;
    }
    let mut code = Assembler::default();
    code.begin(tuple.end);
    let key = -(tuple.len().next_multiple_of(8) as i16);
    for (width, at) in widths(tuple.len()) {
        code.load(width, 3, 6, tuple.start as i16 + at);
        code.store(width, 10, key + at, 3);
    }
    code.map(1, map.as_fd());
    code.copy(2, 10);
    code.add(2, key.into());
    code.call(LOOKUP);
    code.out_if(0, 0);
    code.send_back()
}

/// Loads a program that puts an IP header of `family` in front of every frame, of zeros, and sends it
/// back with its MAC addresses swapped: what whoever wraps has to do.
///
/// # Errors
/// When the kernel refuses it.
pub fn wrap(family: Family) -> io::Result<OwnedFd> {
    let ip_bytes: i16 = if family == Family::V4 { 20 } else { 40 };
    let mut code = Assembler::default();
    code.copy(9, 1);
    code.begin(14);
    // The MAC addresses, swapped, and the type, on the stack.
    for (from, to) in [(0, 6), (2, 8), (4, 10), (6, 0), (8, 2), (10, 4), (12, 12)] {
        code.load(Width::U16, 3, 6, from);
        code.store(Width::U16, 10, to - 16, 3);
    }
    code.copy(1, 9);
    code.set(2, -i32::from(ip_bytes));
    code.call(ADJUST_HEAD);
    code.out_unless(0, 0);
    code.copy(1, 9);
    code.begin(14 + ip_bytes as usize);
    for (width, at) in widths(14) {
        code.load(width, 3, 10, at - 16);
        code.store(width, 6, at, 3);
    }
    code.set(3, 0);
    for (width, at) in widths(ip_bytes as usize) {
        code.store(width, 6, 14 + at, 3);
    }
    code.exit(crate::loaded::XDP_TX);
    code.out(crate::loaded::XDP_PASS)
}

/// A map of programs with `target` as the only one. The kernel empties it when nobody has it open any
/// more.
pub(crate) fn targets(target: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    let targets = bpf::create(MapType::ProgramArray, 4, 4, 1)?;
    let fd = target.as_raw_fd();
    bpf::update(targets.as_fd(), &0_u32.to_ne_bytes(), &fd.to_ne_bytes())?;
    Ok(targets)
}

/// A program that does more than it should.
pub struct Slowed {
    program: OwnedFd,
    _targets: OwnedFd,
}

impl Slowed {
    /// Loads a program that looks something up in a hash map so many times before it goes on
    /// with `target`.
    ///
    /// # Errors
    /// When the kernel refuses a map or the program.
    pub fn new(target: BorrowedFd<'_>, lookups: u32) -> io::Result<Self> {
        let targets = targets(target)?;
        let map = bpf::create(MapType::Hash, 8, 8, 1024)?;
        bpf::update(map.as_fd(), &[0; 8], &[0; 8])?;
        let mut code = Assembler::default();
        code.copy(6, 1);
        for _ in 0..lookups {
            code.set(5, 0);
            code.store(Width::U64, 10, -8, 5);
            code.map(1, map.as_fd());
            code.copy(2, 10);
            code.add(2, -8);
            code.call(LOOKUP);
            code.out_if(0, 0);
        }
        code.go_on(6, targets.as_fd());
        Ok(Self { program: code.out(crate::loaded::XDP_ABORTED)?, _targets: targets })
    }

    /// The program.
    ///
    /// # Errors
    /// When there is no further descriptor.
    pub fn program(&self) -> io::Result<OwnedFd> {
        self.program.try_clone()
    }
}
