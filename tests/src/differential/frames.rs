//! Frames to try: those of the packet cases and of real programs, made others, and what follows
//! from what has come out.

use std::collections::VecDeque;

use crate::{
    model::Random,
    names::{Host, Mac},
    world::OTHER_MAC,
};

/// The virtual addresses of the world, by number.
const VIPS: [u16; 11] = [1, 2, 3, 4, 5, 6, 7, 8, 10, 11, 12];
/// Least and most bytes of a frame: the kernel runs programs on no shorter ones.
const LEAST: usize = 14;
const MOST: usize = 2000;
/// What has come out is kept for as many frames.
const KEPT: usize = 64;
/// Bytes that headers have more often than others.
const LIKELY: [u8; 24] = [
    0, 1, 2, 4, 5, 6, 8, 11, 17, 20, 40, 41, 43, 44, 45, 50, 51, 58, 60, 64, 0x45, 0x60, 0x80, 0xff,
];
const IPV4: [u8; 2] = [0x08, 0x00];
const IPV6: [u8; 2] = [0x86, 0xdd];

/// A frame to begin with, and where virtual addresses stand in it.
struct Seed {
    frame: Vec<u8>,
    vips: Vec<(usize, bool)>,
}

/// Frames to begin with.
#[derive(Default)]
pub struct Corpus(Vec<Seed>);

impl Corpus {
    /// Adds a frame, unless it is there or of a size that can't be run.
    pub fn add(&mut self, frame: &[u8]) {
        let sized = (LEAST..=MOST).contains(&frame.len());
        if !sized || self.0.iter().any(|seed| seed.frame == frame) {
            return;
        }
        let mut vips = Vec::new();
        for at in 12..frame.len() {
            let begins = |addr: &[u8]| frame[at..].starts_with(addr);
            for n in VIPS {
                if begins(&Host::Vip(n).v4().octets()) {
                    vips.push((at, false));
                } else if begins(&Host::Vip(n).v6().octets()) {
                    vips.push((at, true));
                }
            }
        }
        self.0.push(Seed { frame: frame.to_vec(), vips });
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

/// An endless sequence of frames.
pub struct Frames<'a> {
    corpus: &'a Corpus,
    random: Random,
    /// What has come out of late.
    out: VecDeque<Vec<u8>>,
    /// Fragments under way.
    pending: Vec<Vec<u8>>,
}

impl<'a> Frames<'a> {
    /// The sequence that `seed` gives.
    pub fn new(corpus: &'a Corpus, seed: u64) -> Self {
        let random = Random::new(seed);
        Self { corpus, random, out: VecDeque::new(), pending: Vec::new() }
    }

    /// Takes note of a frame that the program has sent.
    pub fn came_out(&mut self, frame: &[u8]) {
        if self.out.len() == KEPT {
            self.out.pop_front();
        }
        self.out.push_back(frame.to_vec());
    }

    fn chance(&mut self, percent: u64) -> bool {
        self.random.below(100) < percent
    }

    fn place(&mut self, end: usize) -> usize {
        self.random.below(end.max(1) as u64) as usize
    }

    /// The next frame.
    pub fn next_frame(&mut self) -> Vec<u8> {
        if !self.pending.is_empty() && self.chance(40) {
            let at = self.place(self.pending.len());
            // Some come twice, and some in another order.
            let again = self.chance(10);
            let frame = if again { self.pending[at].clone() } else { self.pending.swap_remove(at) };
            return frame;
        }
        let mut frame = if !self.out.is_empty() && self.chance(30) {
            self.consequence()
        } else {
            self.seeded()
        };
        if self.chance(6) {
            self.fragment(&frame);
        }
        if self.chance(6) {
            self.tag(&mut frame);
        }
        if self.chance(70) {
            for _ in 0..=self.random.below(4) {
                self.mutate(&mut frame);
            }
        }
        frame.resize(frame.len().clamp(LEAST, MOST), 0);
        if self.chance(97) {
            let mac = self.random.one_of(&[Host::Us.mac(), Host::Us.mac(), OTHER_MAC]);
            frame[..6].copy_from_slice(&mac);
        }
        frame
    }

    /// A frame of the corpus, to one of the services, mostly from one of few clients' ports.
    fn seeded(&mut self) -> Vec<u8> {
        let seed = &self.corpus.0[self.random.below(self.corpus.0.len() as u64) as usize];
        let mut frame = seed.frame.clone();
        let vip = Host::Vip(self.random.one_of(&VIPS));
        for (at, v6) in &seed.vips {
            if *v6 {
                frame[*at..*at + 16].copy_from_slice(&vip.v6().octets());
            } else {
                frame[*at..*at + 4].copy_from_slice(&vip.v4().octets());
            }
        }
        if let Some(at) = transport(&frame)
            && self.chance(50)
        {
            frame[at + 1] = self.random.below(16) as u8;
        }
        frame
    }

    /// What may come next after one of those that have come out.
    fn consequence(&mut self) -> Vec<u8> {
        let at = self.place(self.out.len());
        let mut frame = self.out[at].clone();
        match self.random.below(5) {
            0 => {}
            1 => frame = answer(&frame, &mut self.random),
            2 => frame = error(&frame, &mut self.random),
            3 => {
                frame = answer(&frame, &mut self.random);
                frame = error(&frame, &mut self.random);
            }
            _ => {
                frame = answer(&frame, &mut self.random);
                frame = answer(&frame, &mut self.random);
            }
        }
        frame
    }

    /// Has the fragments of a frame come, one by one.
    fn fragment(&mut self, frame: &[u8]) {
        let id = self.random.bits() as u32;
        let unit = 8 * (1 + self.place(40));
        let made = match frame.get(12..14) {
            Some(ethertype) if ethertype == IPV4 && frame.len() > 34 => {
                fragments_v4(frame, unit, id)
            }
            Some(ethertype) if ethertype == IPV6 && frame.len() > 54 => {
                fragments_v6(frame, unit, id)
            }
            _ => Vec::new(),
        };
        self.pending.extend(made.into_iter().take(24));
        let surplus = self.pending.len().saturating_sub(100);
        self.pending.drain(..surplus);
    }

    /// Puts a tag behind the MAC addresses.
    fn tag(&mut self, frame: &mut Vec<u8>) {
        let [high, low] = self.random.one_of(&[[0x81, 0x00], [0x88, 0xa8]]);
        let id = self.random.one_of(&[0, 10, 10, 20, 30, 0xfff]);
        let priority = self.random.one_of(&[0, 0, 0x60]);
        frame.splice(12..12, [high, low, priority | (id >> 8) as u8, id as u8]);
    }

    fn mutate(&mut self, frame: &mut Vec<u8>) {
        // Mostly in headers.
        let end = if self.chance(80) { frame.len().min(100) } else { frame.len() };
        let at = 6 + self.place(end.saturating_sub(6));
        match self.random.below(10) {
            0 => frame[at] ^= 1 << self.random.below(8),
            1 => frame[at] = self.random.bits() as u8,
            2 | 3 => frame[at] = self.random.one_of(&LIKELY),
            4 => {
                let more = self.random.one_of(&[0, 1, 2, 0xff, 0xfe]);
                frame[at] = frame[at].wrapping_add(more);
            }
            5 => frame.truncate(at.max(LEAST)),
            6 => {
                let more = self.place(64);
                let byte = self.random.one_of(&LIKELY);
                frame.resize((frame.len() + more).min(MOST), byte);
            }
            7 => {
                // A part of it again, elsewhere.
                let from = self.place(frame.len());
                let part: Vec<u8> =
                    frame[from..].iter().take(1 + self.place(24)).copied().collect();
                frame.splice(at..at, part);
            }
            8 => {
                let to = (at + 1 + self.place(16)).min(frame.len());
                frame.drain(at..to);
            }
            _ => self.set_field(frame),
        }
        frame.resize(frame.len().clamp(LEAST, MOST), 0);
    }

    /// Gives a field of IP a value that is seldom right.
    fn set_field(&mut self, frame: &mut [u8]) {
        let v6 = frame.get(12..14).is_some_and(|ethertype| ethertype == IPV6);
        let places: &[usize] =
            if v6 { &[14, 18, 19, 20, 21] } else { &[14, 16, 17, 20, 21, 22, 23] };
        let at = self.random.one_of(places);
        if let Some(byte) = frame.get_mut(at) {
            *byte = match self.random.below(3) {
                0 => self.random.one_of(&LIKELY),
                1 => byte.wrapping_sub(8),
                _ => self.random.bits() as u8,
            };
        }
    }
}

/// Where the transport header of an untagged frame is, if its ports are there.
fn transport(frame: &[u8]) -> Option<usize> {
    let at = match frame.get(12..14)? {
        ethertype if ethertype == IPV4 => 14 + usize::from(frame.get(14)? & 0xf) * 4,
        ethertype if ethertype == IPV6 => 54,
        _ => return None,
    };
    (frame.len() >= at + 20).then_some(at)
}

/// Sends a frame of TCP or UDP to another port.
pub(super) fn to_port(frame: &mut [u8], port: u16) {
    let protocol = match frame.get(12..14) {
        Some(ethertype) if ethertype == IPV6 => frame.get(20),
        _ => frame.get(23),
    };
    if matches!(protocol, Some(6 | 17))
        && let Some(at) = transport(frame)
    {
        frame[at + 2..at + 4].copy_from_slice(&port.to_be_bytes());
    }
}

/// Exchanges two parts of a frame of `bytes` each.
fn exchange(frame: &mut [u8], a: usize, b: usize, bytes: usize) {
    for n in 0..bytes {
        frame.swap(a + n, b + n);
    }
}

/// The other end's answer to a frame.
fn answer(frame: &[u8], random: &mut Random) -> Vec<u8> {
    let mut frame = frame.to_vec();
    exchange(&mut frame, 0, 6, 6);
    let Some(at) = transport(&frame) else { return frame };
    let v6 = frame[12..14] == IPV6;
    if v6 {
        exchange(&mut frame, 22, 38, 16);
    } else {
        exchange(&mut frame, 26, 30, 4);
    }
    exchange(&mut frame, at, at + 2, 2);
    if frame[if v6 { 20 } else { 23 }] == 6 {
        exchange(&mut frame, at + 4, at + 8, 4);
        // One further, as what acknowledges a SYN is.
        let word = frame[at + 8..at + 12].try_into().map_or(0, u32::from_be_bytes);
        let more = random.one_of(&[0, 1, 1, 700]);
        frame[at + 8..at + 12].copy_from_slice(&word.wrapping_add(more).to_be_bytes());
        frame[at + 13] = random.one_of(&[0x12, 0x12, 0x10, 0x18, 0x11, 0x04, 0x14, 0x02]);
    }
    frame
}

/// An error about a frame, sent to who has sent that.
fn error(frame: &[u8], random: &mut Random) -> Vec<u8> {
    let quote = frame.get(14..).unwrap_or_default();
    let v6 = frame.get(12..14).is_some_and(|ethertype| ethertype == IPV6);
    let most = random.one_of(&[28, 48, 60, 500]);
    let quote = &quote[..quote.len().min(most)];
    let router: Mac = Host::Backend(random.one_of(&[1, 8, 11])).mac();
    let mut made = [&Host::Us.mac()[..], &router].concat();
    let length = (8 + quote.len()) as u16;
    if v6 && frame.len() >= 54 {
        let [kind, code] = random.one_of(&[[1, 4], [2, 0], [3, 0], [4, 1]]);
        made.extend(IPV6);
        made.extend([0x60, 0, 0, 0]);
        made.extend(length.to_be_bytes());
        made.extend([58, 64]);
        made.extend_from_slice(&frame[38..54]);
        made.extend_from_slice(&frame[22..38]);
        made.extend([kind, code, 1, 2, 0, 0, 5, 0]);
    } else if !v6 && frame.len() >= 34 {
        let [kind, code] = random.one_of(&[[3, 3], [3, 4], [11, 0], [12, 0]]);
        made.extend(IPV4);
        made.extend([0x45, 0]);
        made.extend((length + 20).to_be_bytes());
        made.extend([0, 1, 0, 0, 64, 1, 3, 4]);
        made.extend_from_slice(&frame[30..34]);
        made.extend_from_slice(&frame[26..30]);
        made.extend([kind, code, 1, 2, 0, 0, 5, 0]);
    } else {
        return frame.to_vec();
    }
    made.extend_from_slice(quote);
    made
}

fn fragments_v4(frame: &[u8], unit: usize, id: u32) -> Vec<Vec<u8>> {
    let header = 14 + usize::from(frame[14] & 0xf).max(5) * 4;
    let Some((header, payload)) = frame.split_at_checked(header) else { return Vec::new() };
    let parts: Vec<_> = payload.chunks(unit).collect();
    let fragment = |(n, part): (usize, &&[u8])| {
        let mut made = [header, part].concat();
        let more = u16::from(n + 1 < parts.len()) << 13;
        let length = (made.len() - 14) as u16;
        made[16..18].copy_from_slice(&length.to_be_bytes());
        made[18..20].copy_from_slice(&(id as u16).to_be_bytes());
        made[20..22].copy_from_slice(&(more | (n * unit / 8) as u16).to_be_bytes());
        made
    };
    parts.iter().enumerate().map(fragment).collect()
}

fn fragments_v6(frame: &[u8], unit: usize, id: u32) -> Vec<Vec<u8>> {
    let (header, payload) = frame.split_at(54);
    let parts: Vec<_> = payload.chunks(unit).collect();
    let fragment = |(n, part): (usize, &&[u8])| {
        let rest = ((n * unit) as u16 & 0xfff8) | u16::from(n + 1 < parts.len());
        let mut made = header.to_vec();
        made.extend([header[20], 0]);
        made.extend(rest.to_be_bytes());
        made.extend(id.to_be_bytes());
        made.extend_from_slice(part);
        made[20] = 44;
        let length = (made.len() - 54) as u16;
        made[18..20].copy_from_slice(&length.to_be_bytes());
        made
    };
    parts.iter().enumerate().map(fragment).collect()
}
