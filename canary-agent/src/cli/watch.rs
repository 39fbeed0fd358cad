//! `--watch`: the same again and again, until it is over or interrupted.
//!
//! On a terminal it is redrawn on the alternate screen; elsewhere the blocks
//! follow one another. An agent that is restarted meanwhile is waited for.

use std::{
    io::{self, Write},
    os::fd::AsRawFd,
    time::Duration,
};

use tokio::{
    signal::unix::{SignalKind, signal},
    time::{MissedTickBehavior, interval},
};

use super::{
    client::Client,
    failure::{Failure, exit},
    on_terminal, print, status,
};

/// How often it is asked.
const EVERY: Duration = Duration::from_secs(1);

/// Shows the status every second until SIGINT, SIGTERM or SIGHUP.
pub(super) async fn run(client: &Client, service: Option<&str>, json: bool) -> Result<(), Failure> {
    again(json, async || Ok((status::block(client, service, json).await?, None))).await.map(drop)
}

/// Shows what `ask` gives, every second until SIGINT, SIGTERM or SIGHUP, or until it gives an exit
/// code with it. That last block stays where it can be read.
pub(super) async fn again(
    json: bool,
    ask: impl AsyncFn() -> Result<(String, Option<u8>), Failure>,
) -> Result<Option<u8>, Failure> {
    let listen = |kind| {
        signal(kind).map_err(|error| {
            Failure::new("failed", exit::FAILED, format!("can't listen for signals: {error}"))
        })
    };
    let mut interrupt = listen(SignalKind::interrupt())?;
    let mut terminate = listen(SignalKind::terminate())?;
    let mut hangup = listen(SignalKind::hangup())?;
    // What is wrong from the start is told like any other command's failure.
    let (mut block, mut over) = ask().await?;
    let mut screen = (on_terminal() && !json).then(Screen::enter).transpose()?;
    let mut ticks = interval(EVERY);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    ticks.reset();
    let mut first = true;
    loop {
        if over.is_some() {
            drop(screen.take());
        }
        match &screen {
            Some(screen) => screen.draw(&block)?,
            None if json || first => print(&block)?,
            None => print(&format!("\n{block}"))?,
        }
        first = false;
        if over.is_some() {
            return Ok(over);
        }
        let next = async {
            ticks.tick().await;
            ask().await
        };
        let asked = tokio::select! {
            _ = interrupt.recv() => return Ok(None),
            _ = terminate.recv() => return Ok(None),
            _ = hangup.recv() => return Ok(None),
            asked = next => asked,
        };
        (block, over) = match asked {
            Ok(asked) => asked,
            Err(failure) => (told(&failure, json), None),
        };
    }
}

/// A failure in the place of what was asked for.
pub(super) fn told(failure: &Failure, json: bool) -> String {
    let line = if json { failure.json() } else { failure.text() };
    line.map_or_else(String::new, |line| line + "\n")
}

/// The terminal's alternate screen; leaving it brings back what was there.
struct Screen;

impl Screen {
    fn enter() -> io::Result<Self> {
        let screen = Self;
        screen.write("\x1b[?1049h\x1b[?25l")?;
        Ok(screen)
    }

    /// Draws what fits of `block`.
    fn draw(&self, block: &str) -> io::Result<()> {
        self.write(&frame(block, size()))
    }

    fn write(&self, text: &str) -> io::Result<()> {
        let mut out = io::stdout().lock();
        out.write_all(text.as_bytes())?;
        out.flush()
    }
}

impl Drop for Screen {
    fn drop(&mut self) {
        // A terminal that is gone needs nothing brought back.
        let _ = self.write("\x1b[?25h\x1b[?1049l");
    }
}

/// The screen's content, cut to its size, each line cleared to its end first.
fn frame(block: &str, (rows, columns): (usize, usize)) -> String {
    let lines: Vec<&str> = block.lines().collect();
    let hidden = lines.len().saturating_sub(rows);
    let shown = if hidden > 0 { rows.saturating_sub(1) } else { lines.len() };
    let mut out = "\x1b[H".to_owned();
    for (index, line) in lines.iter().take(shown).enumerate() {
        if index > 0 {
            out.push_str("\r\n");
        }
        out.extend(line.chars().take(columns));
        out.push_str("\x1b[K");
    }
    if hidden > 0 {
        let more = format!("… {} more lines", lines.len() - shown);
        out.push_str("\r\n");
        out.extend(more.chars().take(columns));
        out.push_str("\x1b[K");
    }
    out.push_str("\x1b[J");
    out
}

/// Rows and columns of the terminal; those of old if it does not say.
fn size() -> (usize, usize) {
    let mut size = libc::winsize { ws_row: 0, ws_col: 0, ws_xpixel: 0, ws_ypixel: 0 };
    // SAFETY: TIOCGWINSZ writes one `winsize`, which `size` is; it is asked of
    // standard output, which stays open for the life of the process.
    let result = unsafe { libc::ioctl(io::stdout().as_raw_fd(), libc::TIOCGWINSZ, &mut size) };
    if result != 0 || size.ws_row == 0 || size.ws_col == 0 {
        return (24, 80);
    }
    (size.ws_row.into(), size.ws_col.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_frame_fits_the_screen() {
        assert_eq!(frame("ab\nc\n", (2, 9)), "\x1b[Hab\x1b[K\r\nc\x1b[K\x1b[J");
        assert_eq!(frame("one\ntwo\nthree\n", (2, 2)), "\x1b[Hon\x1b[K\r\n… \x1b[K\x1b[J");
        assert_eq!(frame("", (2, 2)), "\x1b[H\x1b[J");
    }
}
