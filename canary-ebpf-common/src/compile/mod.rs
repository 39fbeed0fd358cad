//! The table compiler: from a split, weights and health to a backend for every bucket.
//!
//! Owns the two stages of compilation and how their state is written down. Must not know of
//! the kernel, of clocks, of names, or of how often it is called: pure functions, with the
//! same result on every host, x86-64 or aarch64.
//!
//! 1. *Owners*: which version owns each bucket. State, changed by the least ([`plan`],
//!    [`apply`], [`revert`]); [`targets`] rounds the shares of a split, and [`encode_owners`]
//!    and [`encode_changes`] write state down.
//! 2. *Backends*: which backend of its version gets each bucket. Where a version's buckets
//!    prefer to be is state too, a [`Placement`], that follows the configured backends by the
//!    least ([`Placement::follow`], [`encode_placement`]). All else is a function of owners,
//!    placements, weights and health: [`Compiler`] does it for a whole table.
//!
//! # What moves in stage 2
//!
//! | what changes | buckets of the version that move |
//! | --- | --- |
//! | the configured backends: added, removed, another weight, all at once | as many as must |
//! | one backend fails, is drained or comes back, all others being well | as many as must |
//! | a backend that was drained is removed | none |
//! | a split, there and back | the same table again |
//!
//! "As many as must" is by how many the backends' numbers grow, and holds at any share of any
//! version: for one of 100 equal backends that comes or goes, 656 of 65,536 buckets (1.0 %).
//!
//! ## Why a placement is state
//!
//! A table that remembers nothing and holds weights to one bucket has to move more than the
//! least. Three backends show it: let one bucket's worth of quota go from A to B, from B to C
//! and from C back to A. If each step moved one bucket, it would be the same one, and so at
//! every division of the quotas: a table can't be made of one bucket. In general, when one of
//! *m* equal backends leaves, the others' natural gains scatter by the square root of what
//! each gains, and each bucket of that costs about one more that moves: relative to what must,
//! it grows with *m*/√*buckets*. With 100 backends that was a third more; with 100 backends
//! and a twentieth of the buckets, two and a half times as many. Deferred acceptance, draws
//! stratified for each backend and weights adjusted until natural gains fit were tried and
//! were no better than that.
//!
//! The price: hosts whose backends changed in another order, or between other splits, differ in
//! some buckets until one copies the placements of the other, as it has to copy the owners.
//! What a placement prefers stays close to rendezvous hashing, which needs no state, so only
//! exceptions are kept: 300 random changes of 100 backends left 22 KB of them, of ten backends 2.5 KB.
//!
//! ## What still moves more than must
//!
//! Health stays without history: every host must make the same of the same checks, in
//! whatever order it hears of them, and a backend that comes back gets back what it had. So
//! while others are down, too, a failure or return moves more than it must. Measured (mean and
//! worst of 40 failures and returns, with up to a tenth of the backends down):
//!
//! | buckets | backends | weights | more than must |
//! | --- | --- | --- | --- |
//! | 65,536 | 10 | 1 | 1.1 %, 1.6 % |
//! | 65,536 | 10 | 1 to 10 | 1.2 %, 5.8 % |
//! | 65,536 | 30 | 1 | 5.4 %, 6.7 % |
//! | 65,536 | 100 | 1 | 24 %, 31 % |
//! | 65,536 | 100 | 1 to 10 | 23 %, 68 % |
//! | 3277 | 10 | 1 | 5.9 %, 7.4 % |
//! | 3277 | 100 | 1 | 133 %, 176 % |
//! | 655 | 5 | 1 | 2.1 %, 4.3 % |
//! | 655 | 20 | 1 | 34 %, 53 % |
//!
//! So there the tenth of SPEC §4.5 holds up to thirty backends with 65,536 buckets and up to
//! ten with 3277, and not for a hundred. The same goes, by less, for a change of the configuration while
//! a backend is down: with one down 0.8 % more for ten backends, 2 % for thirty, 10 % for a
//! hundred. In buckets that is little: of 65,536 at most 252 too many (0.4 %) were seen when
//! one backend failed or came back.
//!
//! A change of share by one percent of all buckets moves 40 others inside a version of ten
//! backends, 200 inside one of a hundred. And where a version has fallen back, control's
//! backends change for its buckets as they would without a past.

mod backends;
mod codec;
mod owners;
mod placement;
mod score;
mod split;
mod table;

pub use backends::{MAX_BACKENDS, quotas};
pub use codec::{
    DecodeError, decode_changes, decode_owners, decode_placement, encode_changes, encode_owners,
    encode_placement,
};
pub use owners::{Change, OwnersError, apply, counts, difference, initial_owners, plan, revert};
pub use placement::{BackendsError, Placement};
pub use score::identity;
pub use split::{SplitError, Targets, Wanted, targets};
pub use table::{Backend, Compiler, Fallback, Input, InputError, Output, Target, Version};

/// Buckets of one table, at most.
pub const MAX_BUCKETS: u32 = 1 << 20;
