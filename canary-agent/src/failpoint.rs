//! Places at which a test lets the agent die: each write of the store, each between store
//! and maps and between the maps' own, and each while other maps take the place of those that are pinned.
//!
//! Only builds with debug assertions, which no release has, look for them: there, the file
//! that [`FILE`] names holds the name of the place at which the agent ends as by SIGKILL.
//! It is read anew each time, so that a test chooses when.

/// The environment variable that names the file.
pub const FILE: &str = "CANARY_FAILPOINT_FILE";

macro_rules! failpoints {
    (
        change { $($(#[$doc:meta])* $point:ident = $name:literal,)* }
        other { $($(#[$other_doc:meta])* $other:ident = $other_name:literal,)* }
        handover { $($(#[$handover_doc:meta])* $handover:ident = $handover_name:literal,)* }
    ) => {
        /// A place to die at.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        pub enum Failpoint {
            $($(#[$doc])* $point,)*
            $($(#[$other_doc])* $other,)*
            $($(#[$handover_doc])* $handover,)*
        }

        impl Failpoint {
            /// Those of a change, in the order in which it passes them.
            pub const ALL: &[Self] = &[$(Self::$point,)*];

            /// Those that no split passes and no panic: of reloads, and of what is stored besides.
            pub const OTHER: &[Self] = &[$(Self::$other,)*];

            /// Those of a start that puts other maps in the place of those that are pinned, in
            /// the order in which it passes them.
            pub const HANDOVER: &[Self] = &[$(Self::$handover,)*];

            /// The name that stands in the file.
            pub const fn name(self) -> &'static str {
                match self {
                    $(Self::$point => $name,)*
                    $(Self::$other => $other_name,)*
                    $(Self::$handover => $handover_name,)*
                }
            }
        }
    };
}

failpoints! {
change {
    /// A change was asked for and accepted; nothing is written.
    BeforeStore = "before-store",
    /// The store's transaction has begun.
    StoreBegun = "store-begun",
    /// The line of the audit trail is written.
    ChangeWritten = "change-written",
    /// The service's state is written.
    ServiceWritten = "service-written",
    /// Everything is written and nothing committed.
    BeforeCommit = "before-commit",
    /// It is durable.
    Committed = "committed",
    /// It is durable and not planned yet.
    BeforePlan = "before-plan",
    /// It is planned, and no map written.
    BeforeMaps = "before-maps",
    /// Backends' records are written.
    BackendsWritten = "backends-written",
    /// Some words of a ledger are written.
    LedgerHalfWritten = "ledger-half-written",
    /// A ledger is written, and its table is not.
    LedgerWritten = "ledger-written",
    /// Some entries of a table are written.
    TableHalfWritten = "table-half-written",
    /// A table is written.
    TableWritten = "table-written",
    /// Everything is in the maps but maintenance, addresses and the sweep.
    TablesWritten = "tables-written",
    /// Everything is in force, and nobody has been told.
    InForce = "in-force",
    /// Flow entries are to be swept, and none has been.
    BeforeSweep = "before-sweep",
    /// `panic` without an agent has left its marks, and no table is written.
    PanicMarked = "panic-marked",
    /// It has written the ledger of a table, and none of its entries.
    PanicLedgerWritten = "panic-ledger-written",
    /// It has written some entries of a table.
    PanicHalfWritten = "panic-half-written",
    /// All is in force, and nobody has been told.
    PanicWritten = "panic-written",
    /// An agent has stored it, and its marks are still there.
    PanicAdopted = "panic-adopted",
}
other {
    /// Services' addresses are in the maps, and so is still what nothing names any more.
    AddressesWritten = "addresses-written",
    /// The records of backends that are gone are cleared, and the directory names their table.
    RecordsCleared = "records-cleared",
    /// Events that are no changes are written and not committed.
    NoticesWritten = "notices-written",
    /// Where a rollout stands is written and not committed.
    RolloutWritten = "rollout-written",
    /// What has become of members is written and not committed.
    MembersWritten = "members-written",
}
handover {
    /// Maps stand beside those in force, and hold nothing.
    BesideMade = "beside-made",
    /// They hold what the others held.
    BesideFilled = "beside-filled",
    /// On one interface, the program that knows both pairs of flow tables has taken over; it
    /// stores flows in the earlier one.
    FirstLinkPrepared = "first-link-prepared",
    /// On all of them.
    LinksPrepared = "links-prepared",
    /// The maps have changed places.
    SetsSwitched = "sets-switched",
    /// On one interface, flows are stored in the new pair of tables.
    FirstLinkMoved = "first-link-moved",
    /// On all of them.
    LinksMoved = "links-moved",
    /// Some flows are copied.
    FlowsHalfCopied = "flows-half-copied",
    /// All flows are copied.
    FlowsCopied = "flows-copied",
    /// The program that stays is on one interface.
    FirstLinkSwitched = "first-link-switched",
    /// It is on all that had one.
    LinksSwitched = "links-switched",
    /// Some pins of the earlier maps are removed.
    EarlierHalfRemoved = "earlier-half-removed",
    /// All of them are.
    EarlierRemoved = "earlier-removed",
}
}

impl Failpoint {
    /// Whether only `panic` without an agent passes it, or who adopts that.
    pub fn is_of_panic(self) -> bool {
        self.name().starts_with("panic-")
    }

    /// Ends the process here, if a test has chosen this place.
    #[cfg(debug_assertions)]
    pub(crate) fn pass(self) {
        use std::{path::PathBuf, sync::OnceLock};

        use nix::{
            sys::signal::{Signal, kill},
            unistd::Pid,
        };

        static CHOICE: OnceLock<Option<PathBuf>> = OnceLock::new();
        let file = CHOICE.get_or_init(|| std::env::var_os(FILE).map(PathBuf::from));
        let Some(file) = file else { return };
        if std::fs::read_to_string(file).is_ok_and(|chosen| chosen.trim() == self.name()) {
            // Whoever survives SIGKILL goes on, and the test says so.
            let _ = kill(Pid::this(), Signal::SIGKILL);
        }
    }

    /// Nothing: this build knows no tests.
    #[cfg(not(debug_assertions))]
    pub(crate) const fn pass(self) {}
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn names_tell_the_places_apart() {
        let all = || [Failpoint::ALL, Failpoint::OTHER, Failpoint::HANDOVER].into_iter().flatten();
        let names: HashSet<&str> = all().map(|point| point.name()).collect();
        assert_eq!(names.len(), all().count());
    }
}
