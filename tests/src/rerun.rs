//! A program run many times in one call, on the same frame each time.
//!
//! `BPF_PROG_TEST_RUN` gives each run but the first what the one before has left, which a program
//! that changes the frame would not take for the same packet. So a little program comes first:
//! it brings the frame back to its first length and bytes, waits until they are written (no
//! program should find them on their way to the cache), and makes a tail call to the one that
//! is meant. What it takes itself is measured with an empty program in its place. The kernel waits
//! for other processors twice in each such call, so that it lasts much longer than its runs do.

use std::{
    io,
    os::fd::{AsFd as _, BorrowedFd, OwnedFd},
    time::Duration,
};

use aya::maps::MapType;
use nix::time::{ClockId, clock_gettime};

use crate::{
    bpf,
    floor::{self, Assembler, Width, widths},
    loaded::XDP_ABORTED,
};

/// `bpf_xdp_adjust_head` (linux/bpf.h).
const ADJUST_HEAD: i32 = 44;
/// The longest frame, bytes.
const LONGEST: usize = 512;

/// Two bytes of a frame that are another number in each run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Numbers {
    /// Where they are.
    pub at: usize,
    /// The least number.
    pub first: u16,
    /// How many there are, after which they begin again: a power of two.
    pub count: u32,
}

impl Numbers {
    /// All that two bytes can say.
    pub const fn all(at: usize) -> Self {
        Self { at, first: 0, count: 1 << 16 }
    }
}

/// A program with the one before it that restores the frame.
pub struct Rerun {
    program: OwnedFd,
    /// The array whose one value is the frame, and behind it the number of the next run.
    state: OwnedFd,
    /// The kernel empties it when nobody has it open any more.
    _targets: OwnedFd,
    frame: Vec<u8>,
    out: Vec<u8>,
    out_bytes: usize,
}

impl Rerun {
    /// Prepares `target` for `frame`. Where `number_at` is given, the two bytes there are each
    /// run's number.
    ///
    /// # Errors
    /// When the kernel refuses a map or the program.
    ///
    /// # Panics
    /// When the frame is longer than 512 bytes.
    pub fn new(target: BorrowedFd<'_>, frame: &[u8], number_at: Option<usize>) -> io::Result<Self> {
        Self::among(target, frame, number_at.map(Numbers::all))
    }

    /// The same with these numbers.
    ///
    /// # Errors
    /// When the kernel refuses a map or the program.
    ///
    /// # Panics
    /// When the frame is longer than 512 bytes, or the numbers are no power of two.
    pub fn among(
        target: BorrowedFd<'_>,
        frame: &[u8],
        numbers: Option<Numbers>,
    ) -> io::Result<Self> {
        assert!(frame.len() <= LONGEST, "a frame of {} bytes", frame.len());
        let state = bpf::create(MapType::Array, 4, LONGEST as u32 + 8, 1)?;
        let targets = floor::targets(target)?;
        let mut code = Assembler::default();
        code.copy(6, 1);
        // As many bytes off the head as there are too many.
        code.load(Width::U32, 3, 6, 0);
        code.load(Width::U32, 2, 6, 4);
        code.subtract(2, 3);
        code.add(2, -(frame.len() as i32));
        code.call(ADJUST_HEAD);
        code.out_unless(0, 0);
        code.load(Width::U32, 2, 6, 0);
        code.load(Width::U32, 3, 6, 4);
        code.copy(4, 2);
        code.add(4, frame.len() as i32);
        code.out_if_above(4, 3);
        code.value(7, state.as_fd());
        if let Some(Numbers { at, first, count }) = numbers {
            assert!(count.is_power_of_two(), "{count} numbers");
            let number = LONGEST as i16;
            code.load(Width::U32, 5, 7, number);
            code.copy(4, 5);
            code.add(4, 1);
            code.store(Width::U32, 7, number, 4);
            code.and(5, (count - 1).cast_signed());
            code.add(5, first.into());
            code.big_endian_16(5);
            code.store(Width::U16, 7, at as i16, 5);
        }
        for (width, at) in widths(frame.len()) {
            code.load(width, 5, 7, at);
            code.store(width, 2, at, 5);
        }
        code.set(5, 0);
        code.store(Width::U64, 10, -8, 5);
        code.add_atomically(10, -8, 5);
        code.go_on(6, targets.as_fd());
        let rerun = Self {
            program: code.out(XDP_ABORTED)?,
            state,
            _targets: targets,
            frame: frame.to_vec(),
            out: vec![0; 2048],
            out_bytes: 0,
        };
        rerun.number(0)?;
        Ok(rerun)
    }

    /// Says the next run's number.
    ///
    /// # Errors
    /// When the kernel refuses to write it.
    pub fn number(&self, next: u16) -> io::Result<()> {
        let mut value = self.frame.clone();
        value.resize(LONGEST, 0);
        value.extend(u64::from(next).to_ne_bytes());
        bpf::update(self.state.as_fd(), &0_u32.to_ne_bytes(), &value)
    }

    /// Runs it so many times. Returns how long a processor was at it, without what others did there
    /// meanwhile, and what the last run answered.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn run(&mut self, times: u32) -> io::Result<(Duration, u32)> {
        let began = processor_time()?;
        let run = bpf::run_times(self.program.as_fd(), &self.frame, None, &mut self.out, times)?;
        let took = processor_time()?.saturating_sub(began);
        self.out_bytes = run.len_bytes;
        Ok((took, run.action))
    }

    /// The frame as the last run has left it.
    pub fn out(&self) -> &[u8] {
        &self.out[..self.out_bytes]
    }
}

/// What this thread has had of processors.
fn processor_time() -> io::Result<Duration> {
    Ok(clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID)?.into())
}
