-- What a file of schema 7 held: made by the release that knew it, and never edited.
PRAGMA foreign_keys = OFF;
PRAGMA application_id = 1668182649;
PRAGMA user_version = 7;
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
    , backends TEXT, buckets_moved INTEGER NOT NULL DEFAULT 0, slots TEXT, salt INTEGER, freeze TEXT, about TEXT, confirm_ms INTEGER) STRICT;
INSERT INTO "change" VALUES(1,1700000000000,NULL,'shop','initial',NULL,'{}','{}',X'02',NULL,0,NULL,NULL,NULL,NULL,NULL);
INSERT INTO "change" VALUES(2,1700000001000,1000,'shop','split','ticket 7','{}','{"v2":"5%"}',X'02000102030100',NULL,0,NULL,NULL,NULL,NULL,NULL);
INSERT INTO "change" VALUES(3,1700000002000,0,'shop','backend',NULL,'{"v2":"5%"}','{"v2":"5%"}',X'','[{"addr":"10.0.1.1:443","after":"drain","before":"ready"}]',0,NULL,NULL,NULL,NULL,NULL);
INSERT INTO "change" VALUES(4,1700000003000,0,'shop','split','trial','{"v2":"5%"}','{"v2":"10%"}',X'020001010A',NULL,1,'["stable","v2"]',3,NULL,NULL,300000);
INSERT INTO "change" VALUES(5,1700000004000,0,'','freeze','the night before','{}','{}',X'',NULL,0,NULL,NULL,'{"after":"the night before","before":null}',NULL,NULL);
CREATE TABLE event (
        id INTEGER PRIMARY KEY AUTOINCREMENT,
        revision INTEGER REFERENCES change (revision),
        unix_ms INTEGER NOT NULL,
        kind TEXT NOT NULL,
        service TEXT NOT NULL,
        text TEXT NOT NULL
    ) STRICT;
INSERT INTO "event" VALUES(1,1,1700000000000,'initial','shop','');
INSERT INTO "event" VALUES(2,2,1700000001000,'split','shop','');
INSERT INTO "event" VALUES(3,3,1700000002000,'backend','shop','');
INSERT INTO "event" VALUES(4,4,1700000003000,'split','shop','');
INSERT INTO "event" VALUES(5,5,1700000004000,'freeze','','');
INSERT INTO "event" VALUES(6,NULL,1700000005000,'down','shop','10.0.1.1:443 is down: no connection within 1s');
CREATE TABLE evidence (
        id INTEGER PRIMARY KEY AUTOINCREMENT,
        rollout INTEGER NOT NULL REFERENCES rollout (number),
        step INTEGER NOT NULL,
        unix_ms INTEGER NOT NULL,
        window_ms INTEGER NOT NULL,
        signal TEXT NOT NULL,
        share REAL,
        control INTEGER,
        canary INTEGER,
        answer TEXT
    , connections INTEGER) STRICT;
INSERT INTO "evidence" VALUES(1,1,1,1700000007000,1000,'connect_failed',0.05,7,2,NULL,1900);
INSERT INTO "evidence" VALUES(2,1,1,1700000008000,2000,'up > 1',NULL,NULL,NULL,'good: 0.5',NULL);
CREATE TABLE freeze (
        service TEXT PRIMARY KEY,
        revision INTEGER NOT NULL REFERENCES change (revision),
        unix_ms INTEGER NOT NULL,
        uid INTEGER,
        reason TEXT NOT NULL
    ) STRICT, WITHOUT ROWID;
INSERT INTO "freeze" VALUES('',5,1700000004000,0,'the night before');
CREATE TABLE member (
        audience TEXT NOT NULL,
        network TEXT NOT NULL,
        boot_ms INTEGER NOT NULL,
        boot_id TEXT NOT NULL,
        unix_ms INTEGER NOT NULL,
        PRIMARY KEY (audience, network)
    ) STRICT, WITHOUT ROWID;
INSERT INTO "member" VALUES('beta','192.0.2.7/32',5400000,'a-boot',1700000403000);
INSERT INTO "member" VALUES('beta','2001:db8::/64',5500000,'a-boot',1700000503000);
CREATE TABLE pending (
        revision INTEGER PRIMARY KEY REFERENCES change (revision),
        batch INTEGER NOT NULL,
        within_ms INTEGER NOT NULL,
        boot_ms INTEGER NOT NULL,
        boot_id TEXT NOT NULL,
        unix_ms INTEGER NOT NULL
    ) STRICT;
INSERT INTO "pending" VALUES(4,4,300000,5300000,'a-boot',1700000303000);
CREATE TABLE placement (
        service TEXT NOT NULL REFERENCES service (name),
        version TEXT NOT NULL,
        family INTEGER NOT NULL CHECK (family IN (4, 6)),
        placement BLOB NOT NULL,
        PRIMARY KEY (service, version, family)
    ) STRICT, WITHOUT ROWID;
INSERT INTO "placement" VALUES('shop','stable',4,X'03802000');
CREATE TABLE rollout (
        number INTEGER PRIMARY KEY AUTOINCREMENT,
        name TEXT NOT NULL,
        begun_unix_ms INTEGER NOT NULL,
        ended_unix_ms INTEGER,
        record TEXT NOT NULL
    ) STRICT;
INSERT INTO "rollout" VALUES(1,'shop-v2',1700000006000,NULL,'{"step":1}');
CREATE TABLE service (
        name TEXT PRIMARY KEY,
        revision INTEGER NOT NULL REFERENCES change (revision),
        control TEXT NOT NULL,
        split TEXT NOT NULL,
        slots TEXT NOT NULL,
        owners BLOB NOT NULL,
        salt INTEGER NOT NULL
    , admins TEXT NOT NULL DEFAULT '{}') STRICT, WITHOUT ROWID;
INSERT INTO "service" VALUES('shop',4,'stable','{"v2":"10%"}','["stable","v2"]',X'010003010500F81F',3,'{"10.0.1.1:443":"drain"}');
CREATE INDEX change_by_service ON change (service, revision);
CREATE INDEX evidence_by_rollout ON evidence (rollout, id);
CREATE INDEX rollout_by_name ON rollout (name, number);
CREATE INDEX event_change ON event (revision) WHERE revision IS NOT NULL;
CREATE INDEX event_notice ON event (id) WHERE revision IS NULL;
COMMIT;
