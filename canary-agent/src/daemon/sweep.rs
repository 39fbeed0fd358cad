//! The thread that looks after the flow tables while the loop goes on.

use std::{
    io,
    sync::mpsc::{Receiver, Sender, channel},
    thread,
    time::{Duration, Instant},
};

use tokio::sync::mpsc;

use super::Event;
use crate::{datapath::Sweeper, plan::Sweep};

/// Least time between passes that nothing waits for.
const REST: Duration = Duration::from_secs(1);
/// Such passes take this part of the time at most, so that a table of millions of entries does
/// not keep a processor busy.
const SHARE: u32 = 5;
/// Priority of the thread, as nice(2) counts: below all that handles requests.
const NICE: libc::c_int = 10;

/// What the thread is told.
#[derive(Debug)]
pub(super) enum Order {
    /// Sweep this, and say when it is done.
    Sweep(Sweep),
    /// Let expired entries go, if the last pass was long enough ago.
    Expire,
}

/// Starts the thread. It ends when nobody can give it orders any more.
pub(super) fn start(sweeper: Sweeper, events: mpsc::Sender<Event>) -> io::Result<Sender<Order>> {
    let (orders, received) = channel();
    thread::Builder::new()
        .name("flows".to_owned())
        .spawn(move || look_after(sweeper, &received, &events))?;
    Ok(orders)
}

fn look_after(mut sweeper: Sweeper, orders: &Receiver<Order>, events: &mpsc::Sender<Event>) {
    // Of this thread alone. Where it is refused, passes are as important as all else.
    // SAFETY: no memory is involved.
    unsafe { libc::setpriority(libc::PRIO_PROCESS, 0, NICE) };
    let mut rests_until = Instant::now();
    while let Ok(order) = orders.recv() {
        let began = Instant::now();
        match order {
            Order::Sweep(sweep) => {
                let result = sweeper.pass(&sweep.backends).map_err(|error| error.to_string());
                match &result {
                    Ok(swept) => {
                        tracing::debug!(took = ?began.elapsed(), ?swept, "flow tables swept");
                    }
                    Err(error) => tracing::debug!(error, "flow tables not swept"),
                }
                if events.blocking_send(Event::Swept(result.map(drop))).is_err() {
                    return;
                }
            }
            Order::Expire if began < rests_until || sweeper.is_idle() => continue,
            Order::Expire => {
                if let Err(error) = sweeper.pass(&[]) {
                    tracing::warn!(%error, "expired flow entries can't be removed");
                }
            }
        }
        rests_until = Instant::now() + REST.max(began.elapsed() * (SHARE - 1));
    }
}
