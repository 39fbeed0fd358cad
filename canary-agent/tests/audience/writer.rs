//! Writes MaxMind DB files, after the format's specification (version 2.0).

use std::{collections::HashMap, net::IpAddr};

use ipnet::IpNet;

/// A part of a record.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Data {
    Text(&'static str),
    Double(f64),
    U16(u16),
    U32(u32),
    U64(u64),
    U128(u128),
    I32(i32),
    Truth(bool),
    List(Vec<Data>),
    Map(Vec<(&'static str, Data)>),
    /// What stands at that place of the data.
    Pointer(u32),
}

impl Data {
    fn write(&self, out: &mut Vec<u8>) {
        match self {
            Self::Text(text) => {
                head(out, 2, text.len());
                out.extend(text.as_bytes());
            }
            Self::Double(number) => {
                head(out, 3, 8);
                out.extend(number.to_be_bytes());
            }
            Self::U16(number) => whole(out, 5, &number.to_be_bytes()),
            Self::U32(number) => whole(out, 6, &number.to_be_bytes()),
            Self::I32(number) => {
                head(out, 8, 4);
                out.extend(number.to_be_bytes());
            }
            Self::U64(number) => whole(out, 9, &number.to_be_bytes()),
            Self::U128(number) => whole(out, 10, &number.to_be_bytes()),
            Self::Pointer(at) => {
                out.push(1 << 5 | 3 << 3);
                out.extend(at.to_be_bytes());
            }
            Self::Truth(truth) => head(out, 14, usize::from(*truth)),
            Self::List(list) => {
                head(out, 11, list.len());
                list.iter().for_each(|item| item.write(out));
            }
            Self::Map(map) => {
                head(out, 7, map.len());
                for (key, value) in map {
                    Self::Text(key).write(out);
                    value.write(out);
                }
            }
        }
    }
}

/// Leading zeros are left out.
fn whole(out: &mut Vec<u8>, kind: u8, bytes: &[u8]) {
    let zeros = bytes.iter().take_while(|byte| **byte == 0).count();
    head(out, kind, bytes.len() - zeros);
    out.extend(&bytes[zeros..]);
}

fn head(out: &mut Vec<u8>, kind: u8, size: usize) {
    let (low, more): (u8, Vec<u8>) = match size {
        0..29 => (size as u8, vec![]),
        29..285 => (29, vec![(size - 29) as u8]),
        _ => (30, ((size - 285) as u16).to_be_bytes().to_vec()),
    };
    if kind > 7 {
        out.extend([low, kind - 7]);
    } else {
        out.push(kind << 5 | low);
    }
    out.extend(more);
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Branch {
    Nothing,
    Node(usize),
    Record(usize),
}

/// A file in the making.
pub(crate) struct Writer {
    v6: bool,
    description: Vec<(&'static str, Data)>,
    nodes: Vec<[Branch; 2]>,
    records: Vec<Data>,
    aliases: Vec<IpNet>,
}

impl Writer {
    /// For both families, or for IPv4 alone.
    pub(crate) fn new(v6: bool) -> Self {
        Self {
            v6,
            description: vec![("en", Data::Text("a file of a test"))],
            nodes: vec![[Branch::Nothing; 2]],
            records: Vec::new(),
            aliases: Vec::new(),
        }
    }

    /// Says nothing of itself.
    pub(crate) fn undescribed(mut self) -> Self {
        self.description.clear();
        self
    }

    fn bits(&self, net: IpNet) -> (u128, usize) {
        let length = usize::from(net.prefix_len());
        match (net.network(), self.v6) {
            (IpAddr::V4(v4), true) => (u128::from(v4.to_bits()), length + 96),
            (IpAddr::V4(v4), false) => (u128::from(v4.to_bits()) << 96, length),
            (IpAddr::V6(v6), _) => (v6.to_bits(), length),
        }
    }

    /// Gives a network a record; what is inside it and has one keeps it if it comes later.
    pub(crate) fn add(&mut self, net: &str, data: &Data) {
        let record = self.records.iter().position(|known| known == data).unwrap_or_else(|| {
            self.records.push(data.clone());
            self.records.len() - 1
        });
        self.put(net.parse().unwrap(), Branch::Record(record));
    }

    /// Has an IPv6 network lead to the addresses of IPv4.
    pub(crate) fn alias(&mut self, net: &str) {
        self.aliases.push(net.parse().unwrap());
    }

    fn put(&mut self, net: IpNet, branch: Branch) {
        let (bits, length) = self.bits(net);
        let mut at = 0;
        for depth in 0..length {
            let side = (bits >> (127 - depth) & 1) as usize;
            if depth + 1 == length {
                self.nodes[at][side] = branch;
                return;
            }
            at = match self.nodes[at][side] {
                Branch::Node(next) => next,
                // What was whole is divided, with the same in both halves.
                whole => {
                    self.nodes.push([whole; 2]);
                    self.nodes[at][side] = Branch::Node(self.nodes.len() - 1);
                    self.nodes.len() - 1
                }
            };
        }
    }

    /// The node of `::/96`.
    fn ipv4_start(&self) -> Branch {
        (0..96).fold(Branch::Node(0), |branch, _| match branch {
            Branch::Node(at) => self.nodes[at][0],
            other => other,
        })
    }

    /// The file, with records of 24, 28 or 32 bits.
    pub(crate) fn finish(mut self, record_bits: u16) -> Vec<u8> {
        let start = self.ipv4_start();
        for alias in std::mem::take(&mut self.aliases) {
            self.put(alias, start);
        }
        let (mut data, mut offsets) = (Vec::new(), HashMap::new());
        for (at, record) in self.records.iter().enumerate() {
            offsets.insert(at, data.len());
            record.write(&mut data);
        }
        let count = self.nodes.len();
        let value = |branch: Branch| match branch {
            Branch::Nothing => count,
            Branch::Node(at) => at,
            Branch::Record(at) => count + 16 + offsets[&at],
        };
        let mut out = Vec::new();
        for node in &self.nodes {
            let [low, high] = node.map(|branch| (value(branch) as u32).to_be_bytes());
            match record_bits {
                24 => out.extend([&low[1..], &high[1..]].concat()),
                28 => {
                    out.extend(&low[1..]);
                    out.push(low[0] << 4 | high[0] & 0xf);
                    out.extend(&high[1..]);
                }
                _ => out.extend([low, high].concat()),
            }
        }
        out.extend([0; 16]);
        out.extend(data);
        out.extend(b"\xab\xcd\xefMaxMind.com");
        Data::Map(vec![
            ("binary_format_major_version", Data::U16(2)),
            ("binary_format_minor_version", Data::U16(0)),
            ("build_epoch", Data::U64(1_700_000_000)),
            ("database_type", Data::Text("Test-City")),
            ("description", Data::Map(self.description)),
            ("ip_version", Data::U16(if self.v6 { 6 } else { 4 })),
            ("languages", Data::List(vec![Data::Text("en")])),
            ("node_count", Data::U32(count as u32)),
            ("record_size", Data::U16(record_bits)),
        ])
        .write(&mut out);
        out
    }
}
