//! Source ports that the host must not use for itself.
//!
//! `nat` sends to backends from a range of ports. While that range stands in
//! `net.ipv4.ip_local_reserved_ports`, the kernel picks no port of it for the
//! host's own connections (IPv6 too); ports that are asked for by number are not
//! affected. The setting belongs to the network namespace of the calling thread.
//!
//! Owns that one setting. Must not know what the ports are for.

use std::{
    fmt,
    fs::File,
    io::{self, Read, Write},
    num::ParseIntError,
    ops::RangeInclusive,
    str::FromStr,
};

/// Where the kernel has the setting.
const PATH: &str = "/proc/sys/net/ipv4/ip_local_reserved_ports";
/// Bytes; more than the longest list (every other port, seven bytes each) takes.
const LIST_LEN_MAX: usize = 256 << 10;

/// Why ports could not be reserved or released.
#[derive(Debug, thiserror::Error)]
pub enum PortsError {
    /// The setting can't be read.
    #[error("cannot read {PATH}: {0}")]
    Read(#[source] io::Error),
    /// The setting can't be written.
    #[error("cannot write {PATH}: {0}; changing it needs CAP_NET_ADMIN")]
    Write(#[source] io::Error),
    /// The setting is not a list of ports.
    #[error("cannot understand {PATH}: {0}")]
    Parse(#[from] ParsePortsError),
}

/// Text that is not a list of ports.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ParsePortsError {
    /// Not a number from 0 to 65,535.
    #[error("`{text}` is not a port: {reason}")]
    Number {
        /// The offending text.
        text: String,
        /// What is wrong with it.
        reason: ParseIntError,
    },
    /// A range whose end lies before its start.
    #[error("`{0}` is not a range of ports: its end lies before its start")]
    Backwards(String),
}

/// A set of ports, as the kernel writes it: `8080,40000-49999`.
///
/// ```
/// use canary_agent::resolve::PortSet;
///
/// let mut ports: PortSet = "8080,40000-41999\n".parse()?;
/// ports.insert(&(42000..=49999));
/// assert_eq!(ports.to_string(), "8080,40000-49999");
/// ports.remove(&(40000..=49999));
/// assert_eq!(ports.to_string(), "8080");
/// # Ok::<(), canary_agent::resolve::ParsePortsError>(())
/// ```
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PortSet {
    /// Ascending, disjoint, and with at least one port between neighbours.
    ranges: Vec<RangeInclusive<u16>>,
}

impl PortSet {
    /// The ranges, ascending and as few as can be.
    pub fn ranges(&self) -> &[RangeInclusive<u16>] {
        &self.ranges
    }

    /// Adds a range.
    pub fn insert(&mut self, range: &RangeInclusive<u16>) {
        if range.is_empty() {
            return;
        }
        self.ranges.push(range.clone());
        self.ranges.sort_unstable_by_key(|range| *range.start());
        let mut merged: Vec<RangeInclusive<u16>> = Vec::with_capacity(self.ranges.len());
        for range in self.ranges.drain(..) {
            match merged.last_mut() {
                Some(last) if *range.start() <= last.end().saturating_add(1) => {
                    *last = *last.start()..=*last.end().max(range.end());
                }
                _ => merged.push(range),
            }
        }
        self.ranges = merged;
    }

    /// Takes a range away.
    pub fn remove(&mut self, range: &RangeInclusive<u16>) {
        if range.is_empty() {
            return;
        }
        let (first, last) = (*range.start(), *range.end());
        self.ranges = self
            .ranges
            .drain(..)
            .flat_map(|present| {
                let below = (*present.start() < first)
                    .then(|| *present.start()..=*present.end().min(&(first.saturating_sub(1))));
                let above = (*present.end() > last)
                    .then(|| *present.start().max(&last.saturating_add(1))..=*present.end());
                [below, above].into_iter().flatten()
            })
            .collect();
    }

    /// The parts of `range` that are not in the set.
    pub fn missing(&self, range: &RangeInclusive<u16>) -> Vec<RangeInclusive<u16>> {
        let mut missing = Self::default();
        missing.insert(range);
        for present in &self.ranges {
            missing.remove(present);
        }
        missing.ranges
    }
}

impl FromStr for PortSet {
    type Err = ParsePortsError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let port = |text: &str| {
            text.trim()
                .parse::<u16>()
                .map_err(|reason| ParsePortsError::Number { text: text.trim().to_owned(), reason })
        };
        let mut set = Self::default();
        for item in text.split([',', '\n']).map(str::trim).filter(|item| !item.is_empty()) {
            let range = match item.split_once('-') {
                Some((first, last)) => port(first)?..=port(last)?,
                None => port(item)?..=port(item)?,
            };
            if range.is_empty() {
                return Err(ParsePortsError::Backwards(item.to_owned()));
            }
            set.ranges.push(range);
        }
        if let Some(last) = set.ranges.pop() {
            set.insert(&last);
        }
        Ok(set)
    }
}

impl fmt::Display for PortSet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (n, range) in self.ranges.iter().enumerate() {
            let comma = if n == 0 { "" } else { "," };
            match (range.start(), range.end()) {
                (first, last) if first == last => write!(f, "{comma}{first}")?,
                (first, last) => write!(f, "{comma}{first}-{last}")?,
            }
        }
        Ok(())
    }
}

/// Reserves `range`, besides what is reserved already, and gives the parts of it that were
/// not: just these are to be [released](release_ports) later. Doing it twice changes nothing.
///
/// # Errors
/// When the setting can't be read, understood or written; nothing has changed then.
pub fn reserve_ports(range: &RangeInclusive<u16>) -> Result<Vec<RangeInclusive<u16>>, PortsError> {
    let mut set = read()?;
    let missing = set.missing(range);
    if !missing.is_empty() {
        set.insert(range);
        write(&set)?;
    }
    Ok(missing)
}

/// Takes just `range` away from the reserved ports. Doing it twice changes nothing.
///
/// # Errors
/// When the setting can't be read, understood or written; nothing has changed then.
pub fn release_ports(range: &RangeInclusive<u16>) -> Result<(), PortsError> {
    let before = read()?;
    let mut set = before.clone();
    set.remove(range);
    if set == before { Ok(()) } else { write(&set) }
}

/// The ports that are reserved now.
///
/// # Errors
/// When the setting can't be read or understood.
pub fn reserved_ports() -> Result<PortSet, PortsError> {
    read()
}

fn read() -> Result<PortSet, PortsError> {
    // The kernel gives the list to the first read only, cut to that read's length;
    // `fs::read_to_string` may begin with a read of 32 bytes.
    let mut list = vec![0; LIST_LEN_MAX];
    let length =
        File::open(PATH).and_then(|mut file| file.read(&mut list)).map_err(PortsError::Read)?;
    Ok(String::from_utf8_lossy(list.get(..length).unwrap_or_default()).parse::<PortSet>()?)
}

fn write(set: &PortSet) -> Result<(), PortsError> {
    // An empty write is no write at all: a line end empties the list.
    let text = format!("{set}\n");
    File::options()
        .write(true)
        .open(PATH)
        .and_then(|mut file| file.write_all(text.as_bytes()))
        .map_err(PortsError::Write)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    fn set(text: &str) -> PortSet {
        text.parse().unwrap()
    }

    #[test]
    fn lists_are_read_and_written_as_the_kernel_does() {
        for text in ["", "0", "65535", "0-65535", "8080,9148", "1-3,5,7-9"] {
            assert_eq!(set(text).to_string(), text);
        }
        assert_eq!(set("9-9, 7-8\n").to_string(), "7-9");
        assert_eq!("5-1".parse::<PortSet>(), Err(ParsePortsError::Backwards("5-1".to_owned())));
        for text in ["65536", "-1", "a", "1-", "1-2-3"] {
            assert!(
                matches!(text.parse::<PortSet>(), Err(ParsePortsError::Number { .. })),
                "{text}"
            );
        }
    }

    #[test]
    fn what_is_missing_is_what_reserving_adds() {
        assert_eq!(set("100-199,300").missing(&(150..=350)), [200..=299, 301..=350]);
        assert_eq!(set("100-199").missing(&(100..=199)), []);
        assert_eq!(set("").missing(&(0..=u16::MAX)), [0..=u16::MAX]);
    }

    proptest! {
        #[test]
        fn a_set_of_ranges_is_a_set_of_ports(
            steps in prop::collection::vec((any::<bool>(), 0_u16..60, 0_u16..20, any::<bool>()), 0..30),
        ) {
            let (mut ranges, mut ports) = (PortSet::default(), BTreeSet::new());
            for (insert, start, length, high) in steps {
                let start = if high { u16::MAX - start } else { start };
                let range = start..=start.saturating_add(length);
                if insert {
                    ranges.insert(&range);
                    ports.extend(range);
                } else {
                    ranges.remove(&range);
                    ports.retain(|port| !range.contains(port));
                }
                prop_assert!(ranges.ranges().iter().cloned().flatten().eq(ports.iter().copied()));
                for pair in ranges.ranges().windows(2) {
                    prop_assert!(u32::from(*pair[0].end()) + 1 < u32::from(*pair[1].start()));
                }
                prop_assert_eq!(&set(&ranges.to_string()), &ranges);
            }
        }
    }
}
