//! What the kernel says of another process: its memory, and its time on processors.

use std::{fs, io, time::Duration};

use serde::Serialize;

/// Resident memory, bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Memory {
    /// All that is resident (`Rss`).
    pub resident_bytes: u64,
    /// The same, with what is shared divided among those that share it (`Pss`).
    pub proportional_bytes: u64,
    /// What it has allocated: nobody else has it, and it goes with the process.
    pub anonymous_bytes: u64,
    /// Pages of BPF maps that it sees: the kernel's, with or without the process.
    pub maps_bytes: u64,
    /// The most that was ever resident (`VmHWM`).
    pub peak_bytes: u64,
}

impl Memory {
    /// Of the process `pid`.
    ///
    /// # Errors
    /// It is not there.
    pub fn of(pid: u32) -> io::Result<Self> {
        let mut memory = Self::from_smaps(&fs::read_to_string(format!("/proc/{pid}/smaps"))?);
        let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
        memory.peak_bytes = status.lines().find_map(|line| bytes(line, "VmHWM:")).unwrap_or(0);
        Ok(memory)
    }

    fn from_smaps(text: &str) -> Self {
        let mut memory = Self::default();
        let mut of_map = false;
        for line in text.lines() {
            // A mapping's first line begins with its addresses; others with a capitalised key.
            if !line.starts_with(|first: char| first.is_ascii_uppercase()) {
                of_map = line.ends_with("anon_inode:bpf-map");
            } else if let Some(bytes) = bytes(line, "Rss:") {
                memory.resident_bytes += bytes;
                memory.maps_bytes += if of_map { bytes } else { 0 };
            } else if let Some(bytes) = bytes(line, "Pss:") {
                memory.proportional_bytes += bytes;
            } else if let Some(bytes) = bytes(line, "Anonymous:") {
                memory.anonymous_bytes += bytes;
            }
        }
        memory
    }
}

/// The value of a line that begins with `key` and says kibibytes.
fn bytes(line: &str, key: &str) -> Option<u64> {
    let kib: u64 = line.strip_prefix(key)?.trim().strip_suffix("kB")?.trim_end().parse().ok()?;
    Some(kib * 1024)
}

/// Time on processors of all of a process's threads.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    /// Time that they ran.
    pub cpu: Duration,
    /// How often they began to run after they had waited for something.
    pub wakeups: u64,
}

impl Usage {
    /// Of the process `pid`. What threads did that have ended is not in it.
    ///
    /// # Errors
    /// It is not there.
    pub fn of(pid: u32) -> io::Result<Self> {
        let mut usage = Self::default();
        for task in fs::read_dir(format!("/proc/{pid}/task"))?.flatten() {
            let read = |name| fs::read_to_string(task.path().join(name)).unwrap_or_default();
            // Time on a processor comes first (sched-stats of the kernel's documentation).
            let schedstat = read("schedstat");
            let ran_ns = schedstat.split_whitespace().next().and_then(|word| word.parse().ok());
            usage.cpu += Duration::from_nanos(ran_ns.unwrap_or(0));
            let status = read("status");
            let waits = status.lines().find_map(|l| l.strip_prefix("voluntary_ctxt_switches:"));
            usage.wakeups += waits.and_then(|text| text.trim().parse::<u64>().ok()).unwrap_or(0);
        }
        Ok(usage)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_told_apart_by_what_is_mapped() {
        let text = "\
7f00-7f10 rw-p 00000000 00:00 0 \n\
Size:               1024 kB\nRss:                 512 kB\nPss:                 512 kB\n\
Anonymous:           512 kB\nVmFlags: rd wr mr\n\
7f20-7f30 rw-s 00000000 00:0e 1057                       anon_inode:bpf-map\n\
Size:                256 kB\nRss:                 256 kB\nPss:                 128 kB\n\
Anonymous:             0 kB\n";
        assert_eq!(
            Memory::from_smaps(text),
            Memory {
                resident_bytes: 768 << 10,
                proportional_bytes: 640 << 10,
                anonymous_bytes: 512 << 10,
                maps_bytes: 256 << 10,
                peak_bytes: 0
            }
        );
    }

    #[test]
    fn this_process_has_memory_and_has_run() {
        let pid = std::process::id();
        let memory = Memory::of(pid).unwrap();
        assert!(memory.resident_bytes >= memory.anonymous_bytes && memory.anonymous_bytes > 0);
        assert!(memory.peak_bytes > 0);
        assert!(Usage::of(pid).unwrap().cpu > Duration::ZERO);
    }
}
