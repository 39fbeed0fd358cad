//! Chatter: both ends of a connection send when they like, as over a WebSocket.
//!
//! Either direction carries the bytes of [`crate::http::fill`]. The client's
//! come bare. The server's come in messages, each with a [`Report`] of how many
//! of the client's bytes have come and were right; one comes at least every
//! [`PAUSE_MAX`], so that silence in either direction shows at the client.

use std::{io, time::Duration};

use tokio::{
    io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _},
    sync::watch,
    time::{Instant, sleep_until},
};

use crate::{
    http::{fill, first_difference},
    model::Random,
};

/// The name of the protocol in `Upgrade`.
pub const PROTOCOL: &str = "chatter";

/// Longest pause of either end.
pub const PAUSE_MAX: Duration = Duration::from_millis(200);

/// Shortest pause of either end.
const PAUSE_MIN: Duration = Duration::from_millis(20);

/// Most bytes that either end sends at once: more than a segment, and often less.
const PIECE_BYTES_MAX: usize = 4_000;

/// [`Report::received`] of a server that got a wrong byte.
const WRONG: u64 = u64::MAX;

/// Head of a server's message: twelve bytes, big-endian.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Report {
    /// How many of the client's bytes have come, all of them right.
    received: u64,
    /// Length of what follows.
    length: u32,
}

impl Report {
    const BYTES: usize = 12;

    fn encode(self) -> [u8; Self::BYTES] {
        let mut bytes = [0; Self::BYTES];
        bytes[..8].copy_from_slice(&self.received.to_be_bytes());
        bytes[8..].copy_from_slice(&self.length.to_be_bytes());
        bytes
    }

    async fn read(from: &mut (impl AsyncRead + Unpin)) -> io::Result<Self> {
        Ok(Self { received: from.read_u64().await?, length: from.read_u32().await? })
    }
}

/// The server's end, until the client closes.
///
/// # Errors
/// The connection's; `InvalidData` at a wrong byte, of which the client is told.
pub async fn serve(stream: impl AsyncRead + AsyncWrite, mut rng: Random) -> io::Result<()> {
    let (mut reader, mut writer) = tokio::io::split(stream);
    let (count, counted) = watch::channel(0_u64);
    let listen = async {
        let mut buffer = vec![0; PIECE_BYTES_MAX];
        let mut received = 0;
        loop {
            let got = reader.read(&mut buffer).await?;
            if got == 0 {
                return Ok(());
            }
            let right = first_difference(&buffer[..got], received).is_none();
            received += got as u64;
            count.send_replace(if right { received } else { WRONG });
            if !right {
                // The client closes when it has heard.
                return std::future::pending().await;
            }
        }
    };
    let talk = async {
        let mut sent = 0;
        loop {
            let piece = piece(&mut rng, sent);
            let received = *counted.borrow();
            let mut message = Report { received, length: piece.len() as u32 }.encode().to_vec();
            message.extend_from_slice(&piece);
            // One write, so that a short message is one segment.
            writer.write_all(&message).await?;
            sent += piece.len() as u64;
            pause(&mut rng).await;
        }
    };
    tokio::select! {
        ended = listen => ended,
        ended = talk => ended,
    }
}

/// What a client hears of its connection.
pub trait Hear {
    /// So many bytes more were sent.
    fn sent(&mut self, bytes: u64);
    /// A message with so many right bytes came; the server has `received` of the client's.
    fn heard(&mut self, bytes: u64, received: u64);
    /// Whether to close.
    fn enough(&self) -> bool;
}

/// The client's end, until it has had enough.
///
/// # Errors
/// The connection's; `InvalidData` at a wrong byte in either direction.
pub async fn chat(
    stream: impl AsyncRead + AsyncWrite,
    mut rng: Random,
    hear: &std::sync::Mutex<impl Hear>,
) -> io::Result<()> {
    let hear = || hear.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    let (mut reader, mut writer) = tokio::io::split(stream);
    let listen = async {
        let mut buffer = vec![0; PIECE_BYTES_MAX];
        let mut offset = 0;
        while !hear().enough() {
            let Report { received, length } = Report::read(&mut reader).await?;
            let invalid = |what: String| Err(io::Error::new(io::ErrorKind::InvalidData, what));
            if received == WRONG {
                return invalid("the server got a wrong byte".to_owned());
            }
            let Some(buffer) = buffer.get_mut(..length as usize) else {
                return invalid(format!("a message of {length} bytes at {offset}"));
            };
            reader.read_exact(buffer).await?;
            if let Some(at) = first_difference(buffer, offset) {
                return invalid(format!("wrong byte at {at}"));
            }
            offset += u64::from(length);
            hear().heard(length.into(), received);
        }
        Ok(())
    };
    let talk = async {
        let mut sent = 0;
        loop {
            let piece = piece(&mut rng, sent);
            // Before the write: its echo may be here before it returns.
            hear().sent(piece.len() as u64);
            writer.write_all(&piece).await?;
            sent += piece.len() as u64;
            pause(&mut rng).await;
        }
    };
    tokio::select! {
        ended = listen => ended,
        ended = talk => ended,
    }
}

fn piece(rng: &mut Random, offset: u64) -> Vec<u8> {
    let mut piece = vec![0; rng.below(PIECE_BYTES_MAX as u64) as usize];
    fill(&mut piece, offset);
    piece
}

async fn pause(rng: &mut Random) {
    sleep_until(Instant::now() + rng.between(PAUSE_MIN, PAUSE_MAX)).await;
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use super::*;

    /// Hears until so many bytes have gone each way.
    #[derive(Default)]
    struct Ear {
        sent: u64,
        heard: u64,
        received: u64,
    }

    impl Hear for Ear {
        fn sent(&mut self, bytes: u64) {
            self.sent += bytes;
        }

        fn heard(&mut self, bytes: u64, received: u64) {
            self.heard += bytes;
            assert!(received >= self.received && received <= self.sent);
            self.received = received;
        }

        fn enough(&self) -> bool {
            self.heard.min(self.received) > 5_000
        }
    }

    /// Chats through a relay that changes what `change` says, by direction and offset.
    fn chat_through(change: impl Fn(bool, u64) -> bool) -> io::Result<()> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build()?;
        runtime.block_on(async {
            let (client, mut near) = tokio::io::duplex(10_000);
            let (mut far, server) = tokio::io::duplex(10_000);
            let relay = async {
                let (mut up, mut down) = ([0], [0]);
                let mut offsets = [0, 0];
                loop {
                    let (to_server, byte) = tokio::select! {
                        got = near.read(&mut up) => (true, got.map(|n| (n > 0).then(|| up[0]))),
                        got = far.read(&mut down) => (false, got.map(|n| (n > 0).then(|| down[0]))),
                    };
                    let Some(byte) = byte? else { return Ok(()) };
                    let offset = &mut offsets[usize::from(to_server)];
                    let byte = byte ^ u8::from(change(to_server, *offset));
                    *offset += 1;
                    let to = if to_server { &mut far } else { &mut near };
                    to.write_all(&[byte]).await?;
                }
            };
            let ear = Mutex::new(Ear::default());
            tokio::select! {
                ended = chat(client, Random::new(1), &ear) => ended,
                ended = serve(server, Random::new(2)) => ended.and(Err(io::Error::other("the server has ended"))),
                ended = relay => ended.and(Err(io::Error::other("the relay has ended"))),
            }
        })
    }

    #[test]
    fn both_ends_notice_a_wrong_byte() {
        chat_through(|_, _| false).unwrap();
        for to_server in [true, false] {
            let error = chat_through(|direction, offset| direction == to_server && offset == 3_000)
                .unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::InvalidData, "{to_server}: {error}");
        }
    }
}
