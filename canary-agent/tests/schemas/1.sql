-- What a file of schema 1 held: made by the release that knew it, and never edited.
PRAGMA foreign_keys = OFF;
PRAGMA application_id = 1668182649;
PRAGMA user_version = 1;
BEGIN TRANSACTION;
CREATE TABLE change (
        revision INTEGER PRIMARY KEY,
        unix_ms INTEGER NOT NULL,
        uid INTEGER,
        service TEXT NOT NULL,
        action TEXT NOT NULL,
        reason TEXT,
        before TEXT NOT NULL,
        after TEXT NOT NULL,
        moved BLOB NOT NULL
    ) STRICT;
INSERT INTO "change" VALUES(1,1700000000000,NULL,'shop','initial',NULL,'{}','{}',X'02');
INSERT INTO "change" VALUES(2,1700000001000,1000,'shop','split','ticket 7','{}','{"v2":"5%"}',X'02000102030100');
CREATE TABLE service (
        name TEXT PRIMARY KEY,
        revision INTEGER NOT NULL REFERENCES change (revision),
        control TEXT NOT NULL,
        split TEXT NOT NULL,
        slots TEXT NOT NULL,
        owners BLOB NOT NULL,
        salt INTEGER NOT NULL
    ) STRICT, WITHOUT ROWID;
INSERT INTO "service" VALUES('shop',2,'stable','{"v2":"5%"}','["stable","v2"]',X'010003010500F81F',3);
COMMIT;
