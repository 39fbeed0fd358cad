//! A small file system for the agent's state.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use nix::mount::{MntFlags, MsFlags, mount, umount2};

/// Room for the state with all changes of a run.
const ROOM: u64 = 64 << 20;

/// A file system in memory, gone on drop.
pub(super) struct SmallDisk(PathBuf);

impl SmallDisk {
    /// Mounts one at a path, which it makes.
    #[track_caller]
    pub(super) fn over(path: &Path) -> Self {
        fs::create_dir_all(path).expect("a folder");
        let size = format!("size={ROOM}");
        mount(Some("none"), path, Some("tmpfs"), MsFlags::empty(), Some(size.as_str()))
            .expect("a file system in memory");
        Self(path.to_owned())
    }

    /// Its folder.
    pub(super) fn path(&self) -> &Path {
        &self.0
    }

    /// The files of the state.
    pub(super) fn state(&self) -> [PathBuf; 3] {
        ["state.db", "state.db-wal", "state.db-shm"].map(|name| self.0.join(name))
    }

    /// Leaves no room on it, until [`clear`](Self::clear).
    #[track_caller]
    pub(super) fn fill(&self) {
        // Written little by little: what finds no room whole is not written in part everywhere.
        let mut file = fs::File::create(self.filler()).expect("a file");
        let block = [1; 4096];
        let full = loop {
            if let Err(error) = io::Write::write_all(&mut file, &block) {
                break error;
            }
        };
        assert_eq!(full.kind(), io::ErrorKind::StorageFull, "{full}");
    }

    /// Makes room again.
    #[track_caller]
    pub(super) fn clear(&self) {
        fs::remove_file(self.filler()).expect("the file that filled it");
    }

    fn filler(&self) -> PathBuf {
        self.0.join("filler")
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        // It goes when the agent has closed its files.
        let _ = umount2(&self.0, MntFlags::MNT_DETACH);
    }
}
